import type { ModelRunner } from "./model/index.ts";
import type { PagePool } from "./page-pool.ts";

/** Blocks read back at once while sequences run: a reader must not stall them. */
const readsAtOnce = 4;

interface BlockRead {
  readonly id: string;
  readonly resolve: (payload: Uint8Array | undefined) => void;
  readonly reject: (error: unknown) => void;
}

/** Reads of indexed blocks for others, started between steps; they run beside the steps. */
export class BlockReads {
  readonly #pool: PagePool;
  readonly #runner: Pick<ModelRunner, "readBlock">;
  readonly #ended: () => void;
  readonly #waiting: BlockRead[] = [];
  readonly #held: number[] = [];
  readonly #underWay = new Set<Promise<void>>();

  /** @param ended called after each read, when its page is free again. */
  constructor(pool: PagePool, runner: Pick<ModelRunner, "readBlock">, ended: () => void) {
    this.#pool = pool;
    this.#runner = runner;
    this.#ended = ended;
  }

  /** Pages that are being read now, each with a reference. */
  get held(): readonly number[] {
    return this.#held;
  }

  /** The block's payload, or undefined if it is not held when its turn comes. */
  add(id: string): Promise<Uint8Array | undefined> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ id, resolve, reject });
    });
  }

  /** Starts reads that wait; `busy`: only few at once, and the rest later. */
  serve(busy: boolean): void {
    while (this.#waiting.length > 0 && !(busy && this.#underWay.size >= readsAtOnce)) {
      const read = this.#waiting.shift()!;
      const page = this.#pool.acquire(read.id);
      if (page === undefined) {
        read.resolve(undefined);
        continue;
      }
      const reading: Promise<void> = this.#read(read, page).finally(() => this.#underWay.delete(reading));
      this.#underWay.add(reading);
    }
  }

  /** Ends what waits with undefined, and waits for what is being read. */
  async close(): Promise<void> {
    for (const read of this.#waiting.splice(0)) read.resolve(undefined);
    await Promise.all(this.#underWay);
  }

  async #read(read: BlockRead, page: number): Promise<void> {
    this.#held.push(page);
    try {
      read.resolve(await this.#runner.readBlock(page));
    } catch (error) {
      read.reject(error);
    } finally {
      this.#held.splice(this.#held.indexOf(page), 1);
      this.#pool.release([page]);
      this.#ended();
    }
  }
}
