import { collectBlocks, KvBlockHeader_Provenance, type Logger, toClusterError, verifyBlock } from "@kivimesh/proto";
import { idBytes } from "./block-chain.ts";
import { BlockPublisher } from "./block-publisher.ts";
import type { BlockFetch, BlockSink, BlockTransfer, FetchReport, SealedBlock } from "./block-transfer.ts";
import type { CachestoreClient, CachestoreLink } from "./cachestore-link.ts";
import type { Numerics } from "./config.ts";
import type { KvGeometry } from "./model/index.ts";

/** Fetches at once; more are answered at once with nothing, and recomputed. */
const maxFetches = 16;
const lookupDeadlineMs = 1_000;
/** A fetch may take this, and its bytes at the slowest rate that is worth waiting for. */
const fetchBaseMs = 2_000;
const slowestBytesPerMs = 20_000;

/** What blocks must be to be of use here. */
export interface BlockIdentity {
  readonly modelDigest: Uint8Array;
  readonly kv: KvGeometry;
  readonly numerics: Numerics;
}

/** Counters grow from the start; `heldLeases` is of now. */
export interface TransferCounters {
  fetchedBlocks: number;
  fetchedBytes: number;
  /** Blocks that did not match their header or what was asked for; their successors are not taken either. */
  rejectedBlocks: number;
  /** Fetches that ended early because the cachestore failed or was too slow. */
  failedFetches: number;
  publishedBlocks: number;
  publishedBytes: number;
  /** Sealed blocks that were not stored: the queue was full, the page was reused, or the cachestore failed. */
  droppedPublishes: number;
  heldLeases: number;
}

/** Blocks from and to a cachestore. Whatever goes wrong here ends in fewer blocks, never in a failed request. */
export class KvTransfer implements BlockTransfer {
  readonly counters: TransferCounters = {
    fetchedBlocks: 0,
    fetchedBytes: 0,
    rejectedBlocks: 0,
    failedFetches: 0,
    publishedBlocks: 0,
    publishedBytes: 0,
    droppedPublishes: 0,
    heldLeases: 0,
  };
  readonly #link: CachestoreLink;
  readonly #identity: BlockIdentity;
  readonly #logger: Logger;
  readonly #publisher: BlockPublisher;
  #fetches = 0;

  constructor(init: {
    link: CachestoreLink;
    identity: BlockIdentity;
    logger: Logger;
    /** The payload of a block in the GPU pool. */
    readBlock: (id: string) => Promise<Uint8Array | undefined>;
  }) {
    this.#link = init.link;
    this.#identity = init.identity;
    this.#logger = init.logger;
    this.#publisher = new BlockPublisher({ ...init, counters: this.counters });
  }

  fetch(fetch: BlockFetch, sink: BlockSink): void {
    const started = performance.now();
    const client = this.#fetches < maxFetches ? this.#link.client() : undefined;
    const end = (bytes: number) => {
      const report: FetchReport = { bytes, seconds: (performance.now() - started) / 1000 };
      sink.ended(fetch.fetchId, report);
    };
    if (client === undefined) {
      end(0);
      return;
    }
    this.#fetches += 1;
    let bytes = 0;
    const taken: BlockSink = {
      block: (fetchId, id, payload) => {
        bytes += payload.length;
        this.counters.fetchedBlocks += 1;
        this.counters.fetchedBytes += payload.length;
        sink.block(fetchId, id, payload);
      },
      ended: () => undefined,
    };
    void this.#fetchFrom(client, fetch, taken)
      .catch((error: unknown) => this.#noteFailure(error))
      .finally(() => {
        this.#fetches -= 1;
        end(bytes);
      });
  }

  sealed(blocks: readonly SealedBlock[]): void {
    this.#publisher.offer(blocks);
  }

  /** Waits until what was sealed is stored, for at most `graceMs`; false if something was left. */
  flush(graceMs: number): Promise<boolean> {
    return this.#publisher.flush(graceMs);
  }

  close(): void {
    this.#publisher.close();
    this.#link.close();
  }

  async #fetchFrom(client: CachestoreClient, fetch: BlockFetch, sink: BlockSink): Promise<void> {
    const blockIds = fetch.ids.map(idBytes);
    const { held, leaseId } = await client.lookup({ blockIds }, { deadline: lookupDeadlineMs });
    if (held === 0) return;
    this.counters.heldLeases += 1;
    try {
      await this.#fetchHeld(client, { ...fetch, ids: fetch.ids.slice(0, held) }, sink);
    } finally {
      void client
        .release({ leaseId }, { deadline: lookupDeadlineMs })
        .catch((error: unknown) => this.#logger.debug({ error }, "a lease could not be released; it ends by itself"))
        .finally(() => {
          this.counters.heldLeases -= 1;
        });
    }
  }

  async #fetchHeld(client: CachestoreClient, { fetchId, ids, parentId }: BlockFetch, sink: BlockSink): Promise<void> {
    const { kv, modelDigest } = this.#identity;
    const { layers, kvHeads, headDim, blockTokens, residualTokens, formatId } = kv;
    const shape = { layers, kvHeads, headDim, blockTokens, residualTokens };
    const deadline = fetchBaseMs + (ids.length * kv.blockBytes) / slowestBytesPerMs;
    const parts = client.fetch({ blockIds: ids.map(idBytes) }, { deadline });
    let index = 0;
    let parent = idBytes(parentId);
    for await (const { header, payload } of collectBlocks(parts, kv.blockBytes)) {
      const id = ids[index];
      if (id === undefined) return;
      const blockId = idBytes(id);
      verifyBlock(header, payload, { modelDigest, formatId, blockId, parentId: parent, shape });
      const decoded = header.provenance === KvBlockHeader_Provenance.DECODE;
      // Sealed by decode rows: equal up to rounding only.
      if (decoded && this.#identity.numerics === "invariant") return;
      sink.block(fetchId, id, payload);
      parent = blockId;
      index += 1;
    }
  }

  #noteFailure(error: unknown): void {
    const { code, message } = toClusterError(error);
    if (code === "KV_BLOCK_CORRUPT" || code === "MODEL_MISMATCH") {
      this.counters.rejectedBlocks += 1;
      this.#logger.warn({ code, message }, "a fetched block is rejected; it is recomputed");
      return;
    }
    this.counters.failedFetches += 1;
    this.#link.failed();
    const address = this.#link.address;
    this.#logger.warn({ code, message, address }, "the cachestore failed; missing blocks are recomputed");
  }
}
