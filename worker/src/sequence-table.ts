import type { KvGeometry } from "./model/index.ts";
import type { PagePool } from "./page-pool.ts";
import { type RunningView, sealedPages, type WaitingView } from "./scheduler.ts";
import type { Sequence } from "./sequence.ts";

/** The engine's sequences, the slots and the pages they hold. Both lists are kept oldest first. */
export class SequenceTable {
  readonly #pool: PagePool;
  readonly #kv: KvGeometry;
  readonly #freeSlots: number[];
  readonly #maxSequences: number;
  readonly #byId = new Map<string, Sequence>();
  readonly #waiting: Sequence[] = [];
  readonly #running: Sequence[] = [];

  constructor(pool: PagePool, kv: KvGeometry, maxSequences: number) {
    this.#pool = pool;
    this.#kv = kv;
    this.#maxSequences = maxSequences;
    this.#freeSlots = Array.from({ length: maxSequences }, (_, index) => maxSequences - 1 - index);
  }

  get waiting(): readonly Sequence[] {
    return this.#waiting;
  }

  get running(): readonly Sequence[] {
    return this.#running;
  }

  get all(): Sequence[] {
    return [...this.#running, ...this.#waiting];
  }

  /** The sequence that waits or runs under this id. */
  find(id: string): Sequence | undefined {
    return this.#byId.get(id);
  }

  add(sequence: Sequence): void {
    this.#byId.set(sequence.id, sequence);
    insert(this.#waiting, sequence);
  }

  /** Gives the sequence a slot and the pages of its prefix that the pool holds. */
  admit(sequence: Sequence): void {
    const slot = this.#freeSlots.pop();
    if (slot === undefined) throw new RangeError("more sequences were admitted than there are slots");
    const ids = sequence.shareableIds().slice(0, this.#hits(sequence).length);
    const pages = ids.map((id) => this.#pool.acquire(id)!);
    sequence.admit(slot, pages);
    remove(this.#waiting, sequence);
    insert(this.#running, sequence);
  }

  /** Sends a running sequence back to wait; its pages and slot are free. */
  preempt(sequence: Sequence): void {
    this.#letGo(sequence);
    insert(this.#waiting, sequence);
  }

  /** Forgets a sequence; its pages and slot are free. */
  remove(sequence: Sequence): void {
    if (sequence.state === "running") this.#letGo(sequence);
    else remove(this.#waiting, sequence);
    this.#byId.delete(sequence.id);
    sequence.state = "finished";
  }

  /** Makes the pages list long enough for `tokens` computed tokens. The scheduler saw to it that there are enough. */
  reserve(sequence: Sequence, tokens: number): void {
    while (sequence.pages.length < sealedPages(tokens, this.#kv)) {
      const page = this.#pool.allocate();
      if (page === undefined) throw new RangeError("the scheduler planned more pages than there are");
      sequence.pages.push(page);
    }
  }

  /** @param capacityTokens most tokens of a sequence. */
  runningViews(capacityTokens: number): RunningView[] {
    const pool = this.#pool;
    return this.#running.map((sequence) => ({
      id: sequence.id,
      computed: sequence.planned,
      prefillEnd: sequence.prefillEnd,
      decodeSteps: sequence.decodeSteps(capacityTokens),
      pages: sequence.pages.length,
      // Asked for only where somebody has to make room.
      get ownPages() {
        return sequence.pages.filter((page) => pool.references(page) === 1).length;
      },
    }));
  }

  /** Those that could start now, looked up while they are walked. One that fetches blocks nobody else. */
  waitingViews(): Iterable<WaitingView> {
    return { [Symbol.iterator]: () => this.#waitingViews() };
  }

  *#waitingViews(): Generator<WaitingView> {
    for (const sequence of this.#waiting) {
      if (sequence.state !== "ready") continue;
      const hits = this.#hits(sequence);
      yield {
        id: sequence.id,
        prefillEnd: sequence.prefillEnd,
        hitPages: hits.length,
        hitAvailable: hits.filter((page) => this.#pool.references(page) === 0).length,
      };
    }
  }

  /** Pages of every reference that sequences hold. */
  heldPages(): number[] {
    return this.#running.flatMap((sequence) => sequence.pages);
  }

  /** What does not fit together, empty if everything does. */
  checkIntegrity(): string[] {
    const violations: string[] = [];
    const slots = new Set([...this.#freeSlots, ...this.#running.map((sequence) => sequence.slot)]);
    if (slots.size !== this.#maxSequences || this.#freeSlots.length + this.#running.length !== this.#maxSequences) {
      violations.push(
        `${this.#freeSlots.length} slots are free and ${this.#running.length} taken of ${this.#maxSequences}`,
      );
    }
    for (const sequence of this.#waiting) {
      if (sequence.pages.length > 0 || sequence.slot >= 0)
        violations.push(`waiting ${sequence.id} holds pages or a slot`);
    }
    return violations;
  }

  #hits(sequence: Sequence): number[] {
    const hits = this.#pool.match(sequence.shareableIds());
    // The frontier rule reads sealed tokens in whole windows of R only.
    return hits.slice(0, sealedPages(hits.length * this.#kv.blockTokens, this.#kv));
  }

  #letGo(sequence: Sequence): void {
    this.#freeSlots.push(sequence.slot);
    remove(this.#running, sequence);
    this.#pool.release(sequence.preempt());
  }
}

function insert(list: Sequence[], sequence: Sequence): void {
  // Most come last.
  let index = list.length;
  while (index > 0 && list[index - 1]!.arrival > sequence.arrival) index -= 1;
  list.splice(index, 0, sequence);
}

function remove(list: Sequence[], sequence: Sequence): void {
  const index = list.indexOf(sequence);
  if (index >= 0) list.splice(index, 1);
}
