import {
  blockChunks,
  blockIdBytes,
  Cachestore,
  ClusterError,
  collectBlock,
  hex,
  implementService,
  type ServiceBinding,
  type StoreRequest,
  verifyHeader,
} from "@kivimesh/proto";
import type { BlockStore } from "./block-store.ts";

/** Block ids in one lookup, fetch or pin. */
const maxIdsInRequest = 4_096;
/** Uploads at the same time; each holds at most one block in memory. */
const maxUploads = 64;
/** Largest block the store takes, in payload bytes. */
const maxBlockBytes = 128 * 1024 * 1024;
/** Payload bytes of all uploads under way together, beside the memory tier: room for two of the largest blocks. */
const defaultPendingUploadBytes = 2 * maxBlockBytes;
const retryAfterMs = 500;
/** How long an upload may be silent, in milliseconds: a stuck client must not hold a place for ever. */
const defaultUploadIdleMs = 10_000;

/** The gRPC service over a store: checks requests, cuts blocks into chunks, bounds uploads. */
export function cachestoreService(
  store: BlockStore,
  limits: { uploadIdleMs?: number; pendingUploadBytes?: number } = {},
): ServiceBinding {
  const uploadIdleMs = limits.uploadIdleMs ?? defaultUploadIdleMs;
  const pending = new PendingBytes(limits.pendingUploadBytes ?? defaultPendingUploadBytes);
  let uploads = 0;
  return implementService(Cachestore, {
    async lookup({ blockIds, leaseMs }) {
      return store.lookup(checkedIds(blockIds), leaseMs);
    },
    async *fetch({ blockIds }, { signal }) {
      for (const id of checkedIds(blockIds)) {
        const block = await store.fetch(id);
        if (block === undefined || signal.aborted) {
          yield { part: { case: "missing" as const, value: id } };
          return;
        }
        yield { part: { case: "header" as const, value: block.header } };
        for (const value of blockChunks(block.payload)) {
          yield { part: { case: "chunk" as const, value } };
        }
      }
    },
    async store(requests) {
      if (uploads >= maxUploads) {
        throw new ClusterError("QUEUE_FULL", `${maxUploads} uploads run already`, { retryAfterMs });
      }
      uploads++;
      try {
        return { stored: await receive(store, watched(requests, uploadIdleMs), pending) };
      } finally {
        uploads--;
      }
    },
    async release({ leaseId }) {
      store.release(leaseId);
      return {};
    },
    async pin({ blockIds, ttlMs }) {
      return { pinned: await store.pin(checkedIds(blockIds), Number(ttlMs)) };
    },
    async stats() {
      const { lastEvent, leases, ...counts } = store.stats();
      return {
        leases,
        lastEvent,
        blocks: BigInt(counts.blocks),
        memoryBytes: BigInt(counts.memoryBytes),
        memoryLimitBytes: BigInt(counts.memoryLimitBytes),
        diskBytes: BigInt(counts.diskBytes),
        diskLimitBytes: BigInt(counts.diskLimitBytes),
        hits: BigInt(counts.hits),
        misses: BigInt(counts.misses),
        corrupt: BigInt(counts.corrupt),
        evicted: BigInt(counts.evicted),
      };
    },
    async *events({ after }, { signal }) {
      for await (const event of store.follow(after, signal)) {
        const { number } = event;
        if (event.kind === "cleared") {
          yield { number, event: { case: "cleared" as const, value: {} } };
        } else {
          const value = { blockId: event.blockId, parentId: event.parentId };
          const change =
            event.kind === "stored" ? { case: "stored" as const, value } : { case: "removed" as const, value };
          yield { number, event: change };
        }
      }
    },
  });
}

/** Bytes that uploads hold before the store has them. */
class PendingBytes {
  readonly #limit: number;
  #taken = 0;

  constructor(limit: number) {
    this.#limit = limit;
  }

  /** Takes `bytes` until the returned function is called. Throws STORE_FULL where they are not free. */
  take(bytes: number): () => void {
    if (this.#taken + bytes > this.#limit) {
      const problem = `uploads under way hold ${this.#taken} bytes; ${bytes} more would pass the limit of ${this.#limit}`;
      throw new ClusterError("STORE_FULL", problem, { retryAfterMs });
    }
    this.#taken += bytes;
    return () => {
      this.#taken -= bytes;
    };
  }
}

/** Takes one upload. A block that is held already is not read at all. */
async function receive(
  store: BlockStore,
  requests: AsyncIterable<StoreRequest>,
  pending: PendingBytes,
): Promise<boolean> {
  const parts = requests[Symbol.asyncIterator]();
  const first = await parts.next();
  if (first.done || first.value.part.case !== "header") {
    throw new ClusterError("INVALID_ARGUMENT", "an upload starts with the block's header");
  }
  verifyHeader(first.value.part.value);
  if (store.has(first.value.part.value.blockId)) {
    return false;
  }
  const { blockId, payloadBytes } = first.value.part.value;
  if (payloadBytes > BigInt(maxBlockBytes)) {
    const problem = `block ${hex(blockId)} has ${payloadBytes} payload bytes; at most ${maxBlockBytes} are allowed`;
    throw new ClusterError("KV_BLOCK_CORRUPT", problem);
  }
  const give = pending.take(Number(payloadBytes));
  try {
    const rest = { [Symbol.asyncIterator]: () => parts };
    return await store.store(await collectBlock(prepended(first.value, rest), maxBlockBytes));
  } finally {
    give();
  }
}

/** The same parts; throws DEADLINE_EXCEEDED when one takes longer than `idleMs` to come. */
async function* watched(parts: AsyncIterable<StoreRequest>, idleMs: number): AsyncGenerator<StoreRequest> {
  const iterator = parts[Symbol.asyncIterator]();
  for (;;) {
    let timer: NodeJS.Timeout | undefined;
    const silence = new Promise<never>((_, reject) => {
      const late = new ClusterError("DEADLINE_EXCEEDED", `the upload was silent for ${idleMs} ms`);
      timer = setTimeout(() => reject(late), idleMs);
    });
    try {
      const next = await Promise.race([iterator.next(), silence]);
      if (next.done) {
        return;
      }
      yield next.value;
    } finally {
      clearTimeout(timer);
    }
  }
}

async function* prepended(first: StoreRequest, rest: AsyncIterable<StoreRequest>): AsyncGenerator<StoreRequest> {
  yield first;
  yield* rest;
}

function checkedIds(blockIds: readonly Uint8Array[]): readonly Uint8Array[] {
  if (blockIds.length > maxIdsInRequest) {
    throw new ClusterError("INVALID_ARGUMENT", `${blockIds.length} block ids; at most ${maxIdsInRequest} are allowed`, {
      parameter: "block_ids",
    });
  }
  const wrong = blockIds.find((id) => id.length !== blockIdBytes);
  if (wrong !== undefined) {
    throw new ClusterError("INVALID_ARGUMENT", `a block id has ${wrong.length} bytes, not ${blockIdBytes}`, {
      parameter: "block_ids",
    });
  }
  return blockIds;
}
