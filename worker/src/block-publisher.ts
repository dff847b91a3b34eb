import { blockChunks, describeBlock, type Logger, toClusterError } from "@kivimesh/proto";
import { idBytes } from "./block-chain.ts";
import type { SealedBlock } from "./block-transfer.ts";
import type { CachestoreClient, CachestoreLink } from "./cachestore-link.ts";
import type { BlockIdentity, TransferCounters } from "./kv-transfer.ts";

/** Ids of sealed blocks that wait to be stored; beyond that they are dropped. Their bytes stay in the GPU pool. */
const maxQueuedBlocks = 4096;
/** Blocks of one chain that are looked up at once. */
const maxBatchBlocks = 32;
const lookupDeadlineMs = 1_000;
const storeBaseMs = 2_000;
const slowestBytesPerMs = 20_000;
/** How often `flush` looks, in milliseconds. */
const flushPollMs = 10;

/** Stores sealed blocks behind the engine's back: one at a time, in the order they were sealed, those not stored yet. */
export class BlockPublisher {
  readonly #link: CachestoreLink;
  readonly #identity: BlockIdentity;
  readonly #logger: Logger;
  readonly #readBlock: (id: string) => Promise<Uint8Array | undefined>;
  readonly #counters: TransferCounters;
  readonly #queue: SealedBlock[] = [];
  #running = false;
  #closed = false;

  constructor(init: {
    link: CachestoreLink;
    identity: BlockIdentity;
    logger: Logger;
    readBlock: (id: string) => Promise<Uint8Array | undefined>;
    counters: TransferCounters;
  }) {
    this.#link = init.link;
    this.#identity = init.identity;
    this.#logger = init.logger;
    this.#readBlock = init.readBlock;
    this.#counters = init.counters;
  }

  /** Takes blocks as long as there is room and a cachestore. */
  offer(blocks: readonly SealedBlock[]): void {
    if (this.#closed || this.#link.address === undefined) return;
    const room = Math.max(0, maxQueuedBlocks - this.#queue.length);
    this.#counters.droppedPublishes += Math.max(0, blocks.length - room);
    this.#queue.push(...blocks.slice(0, room));
    if (this.#running) return;
    this.#running = true;
    void this.#run();
  }

  /** Waits until everything offered is stored or dropped; false if `graceMs` passed before. */
  async flush(graceMs: number): Promise<boolean> {
    const until = performance.now() + graceMs;
    while (this.#running && performance.now() < until) {
      await new Promise((resolve) => setTimeout(resolve, flushPollMs));
    }
    return !this.#running;
  }

  close(): void {
    this.#closed = true;
    this.#queue.length = 0;
  }

  async #run(): Promise<void> {
    while (this.#queue.length > 0) {
      const batch = this.#takeChain();
      const client = this.#link.client();
      let done = 0;
      try {
        if (client === undefined) continue;
        done = await this.#held(client, batch);
        for (; done < batch.length; done++) await this.#store(client, batch[done]!);
      } catch (error) {
        this.#link.failed();
        const { code, message } = toClusterError(error);
        this.#logger.warn({ code, message, address: this.#link.address }, "sealed blocks could not be stored");
      } finally {
        this.#counters.droppedPublishes += batch.length - done;
      }
    }
    this.#running = false;
  }

  /** The head of the queue as far as each block follows the one before. */
  #takeChain(): SealedBlock[] {
    let length = 1;
    while (length < Math.min(this.#queue.length, maxBatchBlocks)) {
      if (this.#queue[length]!.parentId !== this.#queue[length - 1]!.id) break;
      length += 1;
    }
    return this.#queue.splice(0, length);
  }

  /** How many of the batch, from its first, the cachestore has already. */
  async #held(client: CachestoreClient, batch: readonly SealedBlock[]): Promise<number> {
    const options = { deadline: lookupDeadlineMs };
    const { held, leaseId } = await client.lookup({ blockIds: batch.map(({ id }) => idBytes(id)) }, options);
    if (held > 0) await client.release({ leaseId }, options);
    return held;
  }

  async #store(client: CachestoreClient, block: SealedBlock): Promise<void> {
    const payload = await this.#readBlock(block.id);
    if (payload === undefined) {
      this.#counters.droppedPublishes += 1;
      return;
    }
    const { kv, modelDigest } = this.#identity;
    const { layers, kvHeads, headDim, blockTokens, residualTokens, formatId } = kv;
    const header = describeBlock({
      formatId,
      modelDigest,
      blockId: idBytes(block.id),
      parentId: idBytes(block.parentId),
      shape: { layers, kvHeads, headDim, blockTokens, residualTokens },
      provenance: block.provenance,
      payload,
    });
    async function* parts() {
      yield { part: { case: "header" as const, value: header } };
      for (const chunk of blockChunks(payload!)) yield { part: { case: "chunk" as const, value: chunk } };
    }
    const deadline = storeBaseMs + payload.length / slowestBytesPerMs;
    const { stored } = await client.store(parts(), { deadline });
    if (!stored) return;
    this.#counters.publishedBlocks += 1;
    this.#counters.publishedBytes += payload.length;
  }
}
