import type { ModelRunner } from "./model/index.ts";
import type { PagePool } from "./page-pool.ts";

/** Blocks read back between two steps, at most, while sequences run: a reader must not stall them. */
const readsPerStep = 4;

interface BlockRead {
  readonly id: string;
  readonly resolve: (payload: Uint8Array | undefined) => void;
  readonly reject: (error: unknown) => void;
}

/** Reads of indexed blocks for others, served between steps. */
export class BlockReads {
  readonly #pool: PagePool;
  readonly #runner: Pick<ModelRunner, "readBlock">;
  readonly #waiting: BlockRead[] = [];
  #held: number[] = [];

  constructor(pool: PagePool, runner: Pick<ModelRunner, "readBlock">) {
    this.#pool = pool;
    this.#runner = runner;
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

  /** Reads what waits; `busy`: only a few, and the rest later. */
  async serve(busy: boolean): Promise<void> {
    for (const read of this.#waiting.splice(0, busy ? readsPerStep : this.#waiting.length)) {
      const page = this.#pool.acquire(read.id);
      if (page === undefined) {
        read.resolve(undefined);
        continue;
      }
      this.#held = [page];
      try {
        read.resolve(await this.#runner.readBlock(page));
      } catch (error) {
        read.reject(error);
      } finally {
        this.#held = [];
        this.#pool.release([page]);
      }
    }
  }

  /** Ends what waits with undefined. */
  close(): void {
    for (const read of this.#waiting.splice(0)) read.resolve(undefined);
  }
}
