/**
 * The scheduler: from a snapshot of sequences and free pages to the next step. Pure: no GPU, no I/O, no clock.
 *
 * Policy: oldest first. Every running sequence that decodes gets its row; what is left of the step's row budget goes to
 * prefill chunks, oldest first, then to newly admitted sequences. A sequence is admitted only if the pages for its whole
 * prefill are there. If pages run out, the youngest running sequence is preempted: its pages are dropped and it waits
 * again. The oldest one is never preempted, so something always gets done.
 */

export interface SchedulerLimits {
  /** R: chunks start at multiples of it, and pages are filled R tokens at a time. */
  readonly residualTokens: number;
  readonly blockTokens: number;
  /** Rows of all prefill chunks of a step; at least R. */
  readonly maxPrefillRows: number;
  /** Sequences that run at once. */
  readonly maxSequences: number;
  /** While something decodes, this many steps without prefill lie between two steps with prefill. */
  readonly decodeStepsPerPrefill: number;
  /**
   * While something decodes, prefill that fills less than half of its rows waits this many steps for more: large chunks
   * use a GPU better, and requests that end one by one let new ones in one by one.
   */
  readonly prefillPatience: number;
  /** Most steps that decode rows take at once, where nothing else has to be done in between. */
  readonly decodeSteps: number;
}

/** A sequence with a slot. */
export interface RunningView {
  readonly id: string;
  /** Tokens whose KV exists once the steps under way have ended. */
  readonly computed: number;
  /** Tokens that go through prefill; the rest go through decode, one a step. */
  readonly prefillEnd: number;
  /** Decode steps that it can take before the host has to see a result; 0 where all its tokens are under way. */
  readonly decodeSteps: number;
  /** Pages it holds. */
  readonly pages: number;
  /** Of those, how many become available if it lets go. */
  readonly ownPages: number;
}

/** A sequence that could start now. */
export interface WaitingView {
  readonly id: string;
  readonly prefillEnd: number;
  /** Pages of its prefix that the pool holds, in whole windows, less than its prefill. */
  readonly hitPages: number;
  /** Of those, how many count as available now. */
  readonly hitAvailable: number;
}

export interface SchedulerSnapshot {
  readonly limits: SchedulerLimits;
  /** Oldest request first. */
  readonly running: readonly RunningView[];
  /** Oldest request first; looked at only as far as there is room, and perhaps twice. */
  readonly waiting: Iterable<WaitingView>;
  readonly availablePages: number;
  /** Steps since the last one with prefill. */
  readonly stepsSincePrefill: number;
}

/** Tokens [start, end) of a sequence. */
export interface PlannedChunk {
  readonly id: string;
  readonly start: number;
  readonly end: number;
}

/** To be carried out in this order: preempt, admit (taking the hit pages), then allocate pages and run the rows. */
export interface PlannedStep {
  readonly preempt: readonly string[];
  readonly admit: readonly string[];
  readonly prefill: readonly PlannedChunk[];
  readonly decode: readonly string[];
  /** How often the decode rows run; 1 beside prefill. */
  readonly decodeSteps: number;
}

/** Pages that are full once `tokens` tokens are computed: whole windows of R only. */
export function sealedPages(tokens: number, limits: Pick<SchedulerLimits, "residualTokens" | "blockTokens">): number {
  return Math.floor(tokens / limits.residualTokens) * (limits.residualTokens / limits.blockTokens);
}

/** The next step; all lists empty if nothing can run. */
export function planStep(snapshot: SchedulerSnapshot): PlannedStep {
  const planner = new Planner(snapshot);
  planner.serveRunning();
  planner.admitWaiting();
  return planner.plan;
}

function decodes({ computed, prefillEnd, decodeSteps }: RunningView): boolean {
  return computed >= prefillEnd && decodeSteps > 0;
}

class Planner {
  readonly plan: { preempt: string[]; admit: string[]; prefill: PlannedChunk[]; decode: string[]; decodeSteps: number };
  readonly #snapshot: SchedulerSnapshot;
  readonly #running: RunningView[];
  #available: number;
  #rows: number;
  /** Pages that admitted prefills were promised and have not taken yet. */
  #promised = 0;
  #starved = false;

  constructor(snapshot: SchedulerSnapshot) {
    this.#snapshot = snapshot;
    this.#running = [...snapshot.running];
    this.#available = snapshot.availablePages;
    const prefillTurn = !snapshot.running.some(decodes) || snapshot.stepsSincePrefill >= this.#prefillDelay();
    this.#rows = prefillTurn ? snapshot.limits.maxPrefillRows : 0;
    this.plan = { preempt: [], admit: [], prefill: [], decode: [], decodeSteps: this.#chooseDecodeSteps() };
  }

  /** As many as no row ends within and no prefill waits behind, and as the free pages allow without preemption. */
  #chooseDecodeSteps(): number {
    const { limits, running, availablePages, stepsSincePrefill } = this.#snapshot;
    let steps = limits.decodeSteps;
    if (steps > 1 && this.#prefillIsNear()) {
      steps = this.#rows > 0 ? 1 : Math.min(steps, this.#prefillDelay() - stepsSincePrefill);
    }
    for (const view of running) if (decodes(view)) steps = Math.min(steps, view.decodeSteps);
    while (steps > 1 && this.#decodePages(steps) > availablePages) steps = Math.floor(steps / 2);
    return Math.max(1, steps);
  }

  /** Steps that have to lie between two with prefill. */
  #prefillDelay(): number {
    const { decodeStepsPerPrefill, prefillPatience, maxPrefillRows } = this.#snapshot.limits;
    const isPatient = prefillPatience > decodeStepsPerPrefill && this.#prefillRows() < maxPrefillRows / 2;
    return isPatient ? prefillPatience : decodeStepsPerPrefill;
  }

  /** Rows that prefill could take now, counted up to its budget. */
  #prefillRows(): number {
    const { limits, running, waiting, availablePages } = this.#snapshot;
    let rows = 0;
    for (const { computed, prefillEnd } of running) rows += Math.max(0, prefillEnd - computed);
    let slots = limits.maxSequences - running.length;
    let pages = availablePages;
    for (const { prefillEnd, hitPages, hitAvailable } of waiting) {
      pages -= sealedPages(prefillEnd, limits) - hitPages + hitAvailable;
      if (slots === 0 || pages < 0 || rows >= limits.maxPrefillRows) break;
      rows += prefillEnd - hitPages * limits.blockTokens;
      slots -= 1;
    }
    return rows;
  }

  #prefillIsNear(): boolean {
    const { limits, running, waiting, availablePages } = this.#snapshot;
    if (running.some(({ computed, prefillEnd }) => computed < prefillEnd)) return true;
    if (running.length >= limits.maxSequences) return false;
    for (const { prefillEnd, hitPages, hitAvailable } of waiting) {
      return sealedPages(prefillEnd, limits) - hitPages + hitAvailable <= availablePages;
    }
    return false;
  }

  #decodePages(steps: number): number {
    const { limits, running } = this.#snapshot;
    let pages = 0;
    for (const view of running) {
      if (decodes(view)) pages += Math.max(0, sealedPages(view.computed + steps, limits) - view.pages);
    }
    return pages;
  }

  serveRunning(): void {
    // The list shrinks at its end while it is walked: preemption takes the youngest.
    for (let index = 0; index < this.#running.length; index++) {
      const sequence = this.#running[index]!;
      if (decodes(sequence)) this.#decode(sequence, index);
      else if (sequence.computed < sequence.prefillEnd) this.#prefill(sequence, index);
    }
  }

  admitWaiting(): void {
    const { limits, waiting } = this.#snapshot;
    if (this.#starved || this.plan.preempt.length > 0) return;
    let slots = limits.maxSequences - this.#running.length;
    for (const sequence of waiting) {
      if (slots === 0 || this.#rows === 0) return;
      const fresh = sealedPages(sequence.prefillEnd, limits) - sequence.hitPages;
      // Nobody overtakes the first that does not fit: it would wait for ever behind smaller ones.
      if (fresh + sequence.hitAvailable > this.#available - this.#promised) return;
      const start = sequence.hitPages * limits.blockTokens;
      const chunk = this.#chunk(sequence.id, start, sequence.prefillEnd);
      if (chunk === undefined) return;
      const now = sealedPages(chunk.end, limits) - sequence.hitPages;
      this.#available -= now + sequence.hitAvailable;
      this.#promised += fresh - now;
      this.#rows -= chunk.end - chunk.start;
      this.plan.admit.push(sequence.id);
      this.plan.prefill.push(chunk);
      slots -= 1;
    }
  }

  #decode(sequence: RunningView, index: number): void {
    const end = sequence.computed + this.plan.decodeSteps;
    const needed = sealedPages(end, this.#snapshot.limits) - sequence.pages;
    if (this.#take(Math.max(0, needed), index)) this.plan.decode.push(sequence.id);
  }

  #prefill(sequence: RunningView, index: number): void {
    const { limits } = this.#snapshot;
    const chunk = this.#chunk(sequence.id, sequence.computed, sequence.prefillEnd);
    const whole = sealedPages(sequence.prefillEnd, limits);
    if (chunk === undefined) {
      this.#promised += whole - sequence.pages;
      return;
    }
    const after = sealedPages(chunk.end, limits);
    if (!this.#take(after - sequence.pages, index)) return;
    this.#promised += whole - after;
    this.#rows -= chunk.end - chunk.start;
    this.plan.prefill.push(chunk);
  }

  /** As many tokens as the row budget allows: up to the end, or else whole windows. */
  #chunk(id: string, start: number, prefillEnd: number): PlannedChunk | undefined {
    const { residualTokens } = this.#snapshot.limits;
    const left = prefillEnd - start;
    const tokens = left <= this.#rows ? left : Math.floor(this.#rows / residualTokens) * residualTokens;
    return tokens === 0 ? undefined : { id, start, end: start + tokens };
  }

  /** Takes pages for the sequence at `index`, preempting younger ones; false if there are still too few. */
  #take(pages: number, index: number): boolean {
    while (pages > this.#available && this.#running.length > index + 1) {
      const youngest = this.#running.pop()!;
      this.plan.preempt.push(youngest.id);
      this.#available += youngest.ownPages;
    }
    if (pages > this.#available) {
      // It keeps its pages and tries again in the next step.
      this.#starved = true;
      return false;
    }
    this.#available -= pages;
    return true;
  }
}
