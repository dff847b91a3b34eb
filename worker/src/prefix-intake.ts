import type { BlockSink, BlockTransfer, FetchReport } from "./block-transfer.ts";
import { fetchRateLifeSeconds, MeasuredRate, worthFetching } from "./fetch-choice.ts";
import type { KvGeometry, ModelRunner } from "./model/index.ts";
import type { PagePool } from "./page-pool.ts";
import type { Sequence } from "./sequence.ts";

/** Seconds that a fetch takes besides its bytes, for the choice between fetching and recomputing. */
const fetchOverheadSeconds = 0.005;

interface Intake {
  readonly sequence: Sequence;
  readonly parents: ReadonlyMap<string, string>;
}

type Arrival =
  | { readonly fetchId: number; readonly id: string; readonly payload: Uint8Array }
  | { readonly fetchId: number; readonly report: FetchReport };

/**
 * Brings blocks from elsewhere into the page pool, for sequences that wait. A fetched block enters the prefix index
 * without a holder, as one that a finished sequence left behind: whoever is admitted next takes it like any other hit,
 * and if the pool needs the page before, the block is simply recomputed.
 */
export class PrefixIntake implements BlockSink {
  readonly #pool: PagePool;
  readonly #runner: Pick<ModelRunner, "writeBlock">;
  readonly #kv: KvGeometry;
  readonly #transfer: BlockTransfer;
  readonly #wake: () => void;
  readonly #now: () => number;
  readonly #intakes = new Map<number, Intake>();
  readonly #inFlight = new Set<string>();
  readonly #rate = new MeasuredRate();
  /** When the newest measurement of the rate came in; milliseconds of the clock. */
  #measuredAt = 0;
  #arrivals: Arrival[] = [];
  #nextFetchId = 1;

  constructor(init: {
    pool: PagePool;
    runner: Pick<ModelRunner, "writeBlock">;
    kv: KvGeometry;
    transfer: BlockTransfer;
    wake: () => void;
    /** Milliseconds of a clock that never goes back. */
    now?: () => number;
  }) {
    this.#pool = init.pool;
    this.#runner = init.runner;
    this.#kv = init.kv;
    this.#transfer = init.transfer;
    this.#wake = init.wake;
    this.#now = init.now ?? (() => performance.now());
  }

  /** Whether somebody fetches this block already. */
  fetching(id: string): boolean {
    return this.#inFlight.has(id);
  }

  /** Starts to fetch what the pool lacks of the sequence's prefix; false if there is nothing worth fetching. */
  start(sequence: Sequence, prefillTokensPerSecond: number): boolean {
    const ids = sequence.shareableIds();
    const held = this.#pool.match(ids).length;
    const missing = ids.slice(held, held + this.#pool.available);
    const estimate = {
      tokens: missing.length * this.#kv.blockTokens,
      bytes: missing.length * this.#kv.blockBytes,
      prefillTokensPerSecond,
      fetchBytesPerSecond: this.#rate.value,
      fetchRateAgeSeconds: this.#rateAgeSeconds(),
      fetchSeconds: fetchOverheadSeconds,
    };
    if (missing.length === 0 || !worthFetching(estimate)) return false;
    const fetchId = this.#nextFetchId++;
    const parents = new Map(missing.map((id, index) => [id, sequence.chain.parentOf(held + index)]));
    this.#intakes.set(fetchId, { sequence, parents });
    for (const id of missing) this.#inFlight.add(id);
    sequence.state = "fetching";
    this.#transfer.fetch({ fetchId, ids: missing, parentId: sequence.chain.parentOf(held) }, this);
    return true;
  }

  block(fetchId: number, id: string, payload: Uint8Array): void {
    this.#arrivals.push({ fetchId, id, payload });
    this.#wake();
  }

  ended(fetchId: number, report: FetchReport): void {
    this.#arrivals.push({ fetchId, report });
    this.#wake();
  }

  /** Takes in what has arrived. Called between steps: pages are given and written here. */
  settle(): void {
    const arrivals = this.#arrivals;
    this.#arrivals = [];
    for (const arrival of arrivals) {
      const intake = this.#intakes.get(arrival.fetchId);
      if (intake === undefined) continue;
      if ("report" in arrival) this.#end(arrival.fetchId, intake, arrival.report);
      else this.#takeIn(intake, arrival.id, arrival.payload);
    }
  }

  #takeIn({ sequence, parents }: Intake, id: string, payload: Uint8Array): void {
    const parentId = parents.get(id);
    if (parentId === undefined || payload.length !== this.#kv.blockBytes || this.#pool.has(id)) return;
    const page = this.#pool.allocate();
    if (page === undefined) return;
    this.#runner.writeBlock(page, payload);
    this.#pool.index(page, id, parentId);
    this.#pool.release([page]);
    sequence.fetched.add(id);
    sequence.fetchedBytes += payload.length;
  }

  #end(fetchId: number, { sequence, parents }: Intake, report: FetchReport): void {
    this.#intakes.delete(fetchId);
    for (const id of parents.keys()) this.#inFlight.delete(id);
    this.#measure(report);
    if (sequence.state === "fetching") sequence.state = "ready";
  }

  #measure({ bytes, seconds }: FetchReport): void {
    if (!(bytes > 0)) return;
    // What is too old to decide with must not weigh on its successor either.
    if (this.#rateAgeSeconds() >= fetchRateLifeSeconds) this.#rate.forget();
    if (this.#rate.add(bytes, seconds)) this.#measuredAt = this.#now();
  }

  #rateAgeSeconds(): number {
    return (this.#now() - this.#measuredAt) / 1000;
  }
}
