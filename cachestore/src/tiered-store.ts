import { ClusterError, hex, verifyPayload } from "@kivimesh/proto";
import { LRUCache } from "lru-cache";
import { BlockIndex, type IndexedBlock } from "./block-index.ts";
import type { BlockStore, FollowedEvent, HeldPrefix, StoredBlock, StoreStats } from "./block-store.ts";
import { type DiskEntry, DiskTier, diskBytesOf } from "./disk-tier.ts";
import { EventLog } from "./event-log.ts";
import { chooseVictims } from "./evictor.ts";
import { LeaseTable } from "./lease-table.ts";

export interface TieredStoreOptions {
  /** Where LMDB keeps its file. */
  directory: string;
  /** Payload bytes kept in memory; 0: none. */
  memoryBytes: number;
  /** Bytes of the LMDB file; blocks take at most `blockPartOfFile` of it. */
  diskBytes: number;
  /** Milliseconds since 1970. Default: the clock. */
  now?: () => number;
  /** Milliseconds that never go back. Default: the process's. */
  monotonicNow?: () => number;
  /** Events kept for replay. */
  keptEvents?: number;
}

/** Eviction frees at least this part of what blocks may take at once, so that a full store does not choose victims for every block. */
const evictionStep = 1 / 32;
/** Pins may take at most this part of what blocks may: the rest stays for new blocks. */
const maxPinnedPart = 0.5;
const storeFullRetryMs = 5_000;
/**
 * Part of the disk limit that blocks may take. LMDB never shrinks its file, frees pages only some transactions later, and
 * wants those of one payload side by side: under steady eviction the file grows to about twice what lies in it.
 */
const blockPartOfFile = 0.5;

/** Opens a store: a memory tier over LMDB, both bounded in bytes. Blocks of an earlier process are there again. */
export async function openTieredStore(options: TieredStoreOptions): Promise<BlockStore> {
  const store = new TieredStore(options, DiskTier.open(options.directory));
  await store.load();
  return store;
}

class TieredStore implements BlockStore {
  readonly #options: TieredStoreOptions;
  /** Bytes of all blocks on disk, in whole pages. */
  readonly #blockBytesLimit: number;
  readonly #disk: DiskTier;
  readonly #memory: LRUCache<string, StoredBlock> | undefined;
  readonly #index = new BlockIndex();
  readonly #leases: LeaseTable;
  readonly #events: EventLog;
  readonly #now: () => number;
  /** Stores under way, by block: the first writer wins, the others wait for it. */
  readonly #storing = new Map<string, Promise<boolean>>();
  #reservedBytes = 0;
  /** Numbers given to changes under way; the log gets them when they are committed. */
  #nextNumber: bigint;
  readonly #counts = { hits: 0, misses: 0, corrupt: 0, evicted: 0 };

  constructor(options: TieredStoreOptions, disk: DiskTier) {
    this.#options = options;
    this.#blockBytesLimit = Math.floor(options.diskBytes * blockPartOfFile);
    this.#disk = disk;
    this.#now = options.now ?? Date.now;
    this.#leases = new LeaseTable(options.monotonicNow ?? (() => performance.now()));
    this.#events = new EventLog(disk.lastEvent, options.keptEvents);
    this.#nextNumber = disk.lastEvent + 1n;
    if (options.memoryBytes > 0) {
      this.#memory = new LRUCache({
        maxSize: options.memoryBytes,
        sizeCalculation: (block: StoredBlock) => block.payload.length,
      });
    }
  }

  /** Rebuilds the index from disk; drops entries that are damaged, and what is over a limit that was lowered. */
  async load(): Promise<void> {
    const damaged: Uint8Array[] = [];
    const entries = [...this.#disk.entries((id) => damaged.push(id))];
    // The order in which they were stored stands in for the order of their use.
    entries.sort((left, right) => Number(left.storedNumber - right.storedNumber));
    for (const entry of entries) {
      const block = indexedBlock(entry);
      this.#index.add(block);
      this.#index.touch([block]);
    }
    this.#counts.corrupt += damaged.length;
    if (damaged.length > 0) {
      await this.#disk.write({ remove: damaged, lastEvent: this.#events.lastNumber });
    }
    const over = this.#index.bytes - this.#blockBytesLimit;
    if (over > 0) {
      await this.#drop(this.#victims(over), "evicted");
    }
  }

  lookup(blockIds: readonly Uint8Array[], leaseMs: number): HeldPrefix {
    const held: IndexedBlock[] = [];
    for (const id of blockIds) {
      const block = this.#index.get(hex(id));
      // A block that claims another parent than its place in the chain is of no use to this caller.
      if (block === undefined || (held.length > 0 && block.parentKey !== held.at(-1)?.key)) {
        break;
      }
      held.push(block);
    }
    this.#counts.hits += held.length;
    this.#counts.misses += blockIds.length - held.length;
    if (held.length === 0) {
      return { held: 0, leaseId: "", leaseMs: 0 };
    }
    this.#index.touch(held);
    const keys = held.map((block) => block.key);
    return { held: held.length, ...this.#leases.grant(keys, leaseMs) };
  }

  has(blockId: Uint8Array): boolean {
    return this.#index.get(hex(blockId)) !== undefined;
  }

  async fetch(blockId: Uint8Array): Promise<StoredBlock | undefined> {
    const key = hex(blockId);
    const indexed = this.#index.get(key);
    if (indexed === undefined) {
      this.#counts.misses++;
      return undefined;
    }
    const block = this.#memory?.get(key) ?? (await this.#disk.read(blockId));
    if (block === undefined || !isIntact(block, indexed)) {
      this.#counts.misses++;
      // Evicted while the disk was read: a plain miss.
      if (this.#index.get(key) === indexed) {
        await this.#drop(this.#index.withSuccessors(key), "corrupt");
      }
      return undefined;
    }
    // Evicted while the disk was read: these bytes are still good, but the memory tier holds only what the disk does.
    if (this.#index.get(key) === indexed) {
      this.#index.touch([indexed]);
      this.#memory?.set(key, block);
    }
    return block;
  }

  async store(block: StoredBlock): Promise<boolean> {
    const key = hex(block.header.blockId);
    verifyPayload(block.header, block.payload);
    for (;;) {
      if (this.#index.get(key) !== undefined) {
        return false;
      }
      const other = this.#storing.get(key);
      if (other === undefined) {
        break;
      }
      // Where the first writer fails, the next takes its place.
      await other.catch(() => false);
    }
    const storing = this.#storeNew(key, block);
    this.#storing.set(key, storing);
    try {
      return await storing;
    } finally {
      this.#storing.delete(key);
    }
  }

  async #storeNew(key: string, block: StoredBlock): Promise<boolean> {
    const bytes = diskBytesOf(block.payload.length);
    const victims = this.#makeRoom(bytes);
    this.#reservedBytes += bytes;
    this.#forget(victims);
    const storedNumber = this.#nextNumber + BigInt(victims.length);
    this.#nextNumber = storedNumber + 1n;
    try {
      await this.#disk.write({
        remove: victims.map((victim) => victim.id),
        put: { block, storedNumber, pinnedUntil: 0 },
        lastEvent: storedNumber,
      });
    } catch (error) {
      // Nothing was committed: what should have gone is still there.
      for (const victim of victims) {
        this.#index.add(victim);
      }
      throw new ClusterError("STORE_FULL", "the disk does not take the block", { cause: error });
    } finally {
      this.#reservedBytes -= bytes;
    }
    this.#counts.evicted += victims.length;
    this.#tellRemoved(victims);
    const indexed = indexedBlock({ id: block.header.blockId, header: block.header, storedNumber, pinnedUntil: 0 });
    this.#index.add(indexed);
    this.#index.touch([indexed]);
    this.#memory?.set(key, block);
    this.#events.append("stored", indexed.id, indexed.parentId);
    return true;
  }

  release(leaseId: string): void {
    this.#leases.release(leaseId);
  }

  async pin(blockIds: readonly Uint8Array[], ttlMs: number): Promise<number> {
    const now = this.#now();
    const pinnedUntil = ttlMs === 0 ? 0 : now + ttlMs;
    let pinnedBytes = 0;
    for (const block of this.#index.values()) {
      pinnedBytes += block.pinnedUntil > now ? block.bytes : 0;
    }
    const repin: { entry: DiskEntry; pinnedUntil: number }[] = [];
    for (const id of blockIds) {
      const block = this.#index.get(hex(id));
      const entry = block && this.#disk.entry(id);
      if (block === undefined || entry === undefined) {
        continue;
      }
      const more = ttlMs === 0 || block.pinnedUntil > now ? 0 : block.bytes;
      if (pinnedBytes + more > this.#blockBytesLimit * maxPinnedPart) {
        break;
      }
      pinnedBytes += more;
      // At once, so that nothing evicts it while the disk writes.
      block.pinnedUntil = pinnedUntil;
      repin.push({ entry, pinnedUntil });
    }
    if (repin.length > 0) {
      await this.#disk.write({ repin, lastEvent: this.#nextNumber - 1n });
    }
    return ttlMs === 0 ? 0 : repin.length;
  }

  stats(): StoreStats {
    return {
      blocks: this.#index.size,
      memoryBytes: this.#memory?.calculatedSize ?? 0,
      memoryLimitBytes: this.#options.memoryBytes,
      diskBytes: this.#index.bytes,
      diskLimitBytes: this.#blockBytesLimit,
      leases: this.#leases.size,
      ...this.#counts,
      lastEvent: this.#events.lastNumber,
    };
  }

  follow(after: bigint, signal: AbortSignal): AsyncGenerator<FollowedEvent> {
    return this.#events.follow(after, signal, () =>
      [...this.#index.values()].map((block) => ({ blockId: block.id, parentId: block.parentId })),
    );
  }

  async checkIntegrity(options: { payloads?: boolean } = {}): Promise<string[]> {
    const violations = [...this.#index.checkIntegrity(), ...this.#leases.checkIntegrity()];
    if (this.#index.bytes > this.#blockBytesLimit) {
      violations.push(`${this.#index.bytes} bytes are held, ${this.#blockBytesLimit} allowed`);
    }
    const onDisk = new Set<string>();
    for (const entry of this.#disk.entries((id) => violations.push(`entry ${hex(id)} is damaged`))) {
      onDisk.add(hex(entry.id));
    }
    for (const block of [...this.#index.values()]) {
      if (!onDisk.delete(block.key) || !this.#disk.hasPayload(block.id)) {
        violations.push(`block ${block.key} is not on disk`);
      } else if (options.payloads) {
        const read = await this.#disk.read(block.id);
        if (read === undefined || !isIntact(read, block)) {
          violations.push(`block ${block.key} is damaged on disk`);
        }
      }
    }
    if (onDisk.size > 0 || this.#disk.payloadCount() !== this.#index.size) {
      violations.push(
        `${onDisk.size} entries and ${this.#disk.payloadCount()} payloads on disk, ${this.#index.size} known`,
      );
    }
    for (const key of this.#memory?.keys() ?? []) {
      if (this.#index.get(key) === undefined) {
        violations.push(`block ${key} is in memory but not on disk`);
      }
    }
    return violations;
  }

  async close(): Promise<void> {
    await Promise.allSettled(this.#storing.values());
    await this.#disk.close();
  }

  /** The blocks that must go for `bytes` more. Throws STORE_FULL if not enough may. */
  #makeRoom(bytes: number): IndexedBlock[] {
    const limit = this.#blockBytesLimit;
    const over = this.#index.bytes + this.#reservedBytes + bytes - limit;
    if (over <= 0) {
      return [];
    }
    const victims = bytes > limit ? [] : this.#victims(Math.max(over, limit * evictionStep));
    if (victims.reduce((sum, victim) => sum + victim.bytes, 0) < over) {
      throw new ClusterError("STORE_FULL", `no room for ${bytes} bytes: the rest of ${limit} is leased or pinned`, {
        retryAfterMs: storeFullRetryMs,
      });
    }
    return victims;
  }

  #victims(bytesToFree: number): IndexedBlock[] {
    this.#leases.expire();
    const now = this.#now();
    const blocks = [...this.#index.values()].map((block) => ({
      id: block.key,
      parentId: block.parentKey,
      bytes: block.bytes,
      lastUsed: block.lastUsed,
      isProtected: block.pinnedUntil > now || this.#leases.isLeased(block.key),
    }));
    return chooseVictims(blocks, bytesToFree).flatMap((key) => this.#index.get(key) ?? []);
  }

  async #drop(blocks: readonly IndexedBlock[], reason: "corrupt" | "evicted"): Promise<void> {
    if (blocks.length === 0) {
      return;
    }
    this.#forget(blocks);
    this.#counts[reason] += reason === "corrupt" ? 1 : blocks.length;
    const lastEvent = this.#nextNumber + BigInt(blocks.length) - 1n;
    this.#nextNumber = lastEvent + 1n;
    await this.#disk.write({ remove: blocks.map((block) => block.id), lastEvent });
    this.#tellRemoved(blocks);
  }

  #forget(blocks: readonly IndexedBlock[]): void {
    for (const block of blocks) {
      this.#index.remove(block.key);
      this.#memory?.delete(block.key);
    }
  }

  #tellRemoved(blocks: readonly IndexedBlock[]): void {
    for (const block of blocks) {
      this.#events.append("removed", block.id, block.parentId);
    }
  }
}

function indexedBlock(entry: DiskEntry): IndexedBlock {
  const { header, storedNumber, pinnedUntil } = entry;
  return {
    id: header.blockId,
    key: hex(header.blockId),
    parentId: header.parentId,
    parentKey: hex(header.parentId),
    bytes: diskBytesOf(Number(header.payloadBytes)),
    storedNumber,
    lastUsed: 0,
    pinnedUntil,
  };
}

/** Whether the bytes are the block's own, as the index knows it and its CRC says. */
function isIntact(block: StoredBlock, indexed: IndexedBlock): boolean {
  if (hex(block.header.blockId) !== indexed.key || hex(block.header.parentId) !== indexed.parentKey) {
    return false;
  }
  try {
    verifyPayload(block.header, block.payload);
    return true;
  } catch (error) {
    if (error instanceof ClusterError && error.code === "KV_BLOCK_CORRUPT") {
      return false;
    }
    throw error;
  }
}
