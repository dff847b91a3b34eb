import type { KvBlockHeader } from "@kivimesh/proto";

/** A sealed block with the header that describes it. Immutable. */
export interface StoredBlock {
  readonly header: KvBlockHeader;
  readonly payload: Uint8Array;
}

/** The answer to a lookup: how many of the asked blocks, from the first, are held, and the lease that keeps them. */
export interface HeldPrefix {
  held: number;
  /** Empty where nothing is held. */
  leaseId: string;
  leaseMs: number;
}

/** A change of what is held. `number` rises by one with each, also over restarts. */
export interface BlockEvent {
  readonly number: bigint;
  readonly kind: "stored" | "removed";
  readonly blockId: Uint8Array;
  readonly parentId: Uint8Array;
}

/** What a follower of events gets: a change, or word that it must forget everything it knew. */
export type FollowedEvent = BlockEvent | { readonly number: bigint; readonly kind: "cleared" };

export interface StoreStats {
  blocks: number;
  memoryBytes: number;
  memoryLimitBytes: number;
  diskBytes: number;
  /** What blocks may take of the disk limit. */
  diskLimitBytes: number;
  leases: number;
  /** Blocks that lookups found. */
  hits: number;
  /** Blocks that lookups did not find, and fetches that found nothing or damage. */
  misses: number;
  /** Blocks dropped because their bytes did not match their header. */
  corrupt: number;
  evicted: number;
  lastEvent: bigint;
}

/**
 * Keeps sealed blocks: immutable, the first writer wins. Ids are 32 bytes. Nothing that fails its checks is ever handed
 * out: it counts as a miss and is dropped.
 */
export interface BlockStore {
  /** The longest held prefix of a chain, under a lease. `leaseMs` 0 asks for the store's default; the store may shorten it. */
  lookup(blockIds: readonly Uint8Array[], leaseMs: number): HeldPrefix;
  /** A block, verified; undefined if it is not held or was found damaged. */
  fetch(blockId: Uint8Array): Promise<StoredBlock | undefined>;
  has(blockId: Uint8Array): boolean;
  /** Keeps a block once it is verified and on disk. False: it was there already. Throws KV_BLOCK_CORRUPT, STORE_FULL. */
  store(block: StoredBlock): Promise<boolean>;
  /** Ends a lease. An unknown or ended one is no error. */
  release(leaseId: string): void;
  /** Keeps held blocks from eviction for `ttlMs`, over restarts too; 0 lets them go. How many of them are pinned now. */
  pin(blockIds: readonly Uint8Array[], ttlMs: number): Promise<number>;
  stats(): StoreStats;
  /** Changes after number `after`, then new ones as they come, until `signal` aborts. 0: from now on. */
  follow(after: bigint, signal: AbortSignal): AsyncGenerator<FollowedEvent>;
  /** What is inconsistent inside, in words; empty when all is well. `payloads` also reads and checks every block. */
  checkIntegrity(options?: { payloads?: boolean }): Promise<string[]>;
  close(): Promise<void>;
}
