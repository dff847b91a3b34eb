import type { KvGeometry } from "./model/index.ts";
import type { PagePool } from "./page-pool.ts";
import { type RunningView, sealedPages, type WaitingView } from "./scheduler.ts";
import type { Sequence } from "./sequence.ts";

/** A running sequence as the scheduler sees it: always as it is now, made once. */
class LiveView implements RunningView {
  readonly id: string;
  readonly #sequence: Sequence;
  readonly #pool: PagePool;
  readonly #longest: number;

  constructor(sequence: Sequence, pool: PagePool, longest: number) {
    this.id = sequence.id;
    this.#sequence = sequence;
    this.#pool = pool;
    this.#longest = longest;
  }

  get computed(): number {
    return this.#sequence.planned;
  }

  get prefillEnd(): number {
    return this.#sequence.prefillEnd;
  }

  get decodeSteps(): number {
    return this.#sequence.decodeSteps(this.#longest);
  }

  get pages(): number {
    return this.#sequence.pages.length;
  }

  get ownPages(): number {
    return this.#sequence.pages.filter((page) => this.#pool.references(page) === 1).length;
  }
}

/** The engine's sequences, the slots and the pages they hold. Both lists are kept oldest first. */
export class SequenceTable {
  readonly #pool: PagePool;
  readonly #kv: KvGeometry;
  readonly #freeSlots: number[];
  readonly #maxSequences: number;
  readonly #byId = new Map<string, Sequence>();
  readonly #waiting: Sequence[] = [];
  readonly #running: Sequence[] = [];
  /** Of `#running`, in its order. */
  readonly #views: LiveView[] = [];
  readonly #longest: number;

  /** @param longest most tokens of a sequence. */
  constructor(pool: PagePool, kv: KvGeometry, maxSequences: number, longest: number) {
    this.#longest = longest;
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
    const index = insert(this.#running, sequence);
    this.#views.splice(index, 0, new LiveView(sequence, this.#pool, this.#longest));
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

  runningViews(): readonly RunningView[] {
    return this.#views;
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
    this.#views.splice(remove(this.#running, sequence), 1);
    this.#pool.release(sequence.preempt());
  }
}

function insert(list: Sequence[], sequence: Sequence): number {
  // Most come last.
  let index = list.length;
  while (index > 0 && list[index - 1]!.arrival > sequence.arrival) index -= 1;
  list.splice(index, 0, sequence);
  return index;
}

function remove(list: Sequence[], sequence: Sequence): number {
  const index = list.indexOf(sequence);
  if (index >= 0) list.splice(index, 1);
  return index;
}
