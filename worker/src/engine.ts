import { ClusterError, toClusterError } from "@kivimesh/proto";
import { AttemptRegistry } from "./attempt-registry.ts";
import { BlockReads } from "./block-reads.ts";
import type { BlockTransfer, SealedBlock } from "./block-transfer.ts";
import type { Numerics } from "./config.ts";
import { EngineCounters } from "./engine-counters.ts";
import type { EngineStats } from "./engine-stats.ts";
import { type BuiltStep, buildStep, type StepPart } from "./engine-step.ts";
import type { GenerationEvent, GenerationOutcome, GenerationRequest } from "./generation.ts";
import type { ModelRunner, SampledToken } from "./model/index.ts";
import { PagePool, type PrefixIndexChange } from "./page-pool.ts";
import { PrefixIntake } from "./prefix-intake.ts";
import { checkRequest } from "./request-check.ts";
import { planStep, type SchedulerLimits, sealedPages } from "./scheduler.ts";
import { Sequence, sequenceId } from "./sequence.ts";
import { SequenceTable } from "./sequence-table.ts";
import { stepTimeoutMs, within } from "./step-timeout.ts";
import { WakeSignal } from "./wake-signal.ts";

/** How long an engine that cannot run a step waits for pages or blocks before it looks again, in milliseconds. */
const stalledMs = 20;

export interface EngineOptions {
  readonly runner: ModelRunner;
  /** 32 bytes. */
  readonly modelDigest: Uint8Array;
  readonly numerics: Numerics;
  /** Prefill rows of one step; at least R and at most the runner's. */
  readonly maxPrefillRows: number;
  /** See SchedulerLimits. */
  readonly decodeStepsPerPrefill: number;
  /** Gets what happened, once a step. */
  readonly onEvents: (events: readonly GenerationEvent[]) => void;
  readonly onPrefixChange?: (change: PrefixIndexChange) => void;
  /** After every step and when the engine falls idle. */
  readonly onStats?: () => void;
  /** The GPU or the runner failed: every sequence has failed, and nothing runs any more. */
  readonly onFailure?: (error: Error) => void;
  readonly transfer?: BlockTransfer;
}

/**
 * Runs generation requests on one model runner: continuous batching, chunked prefill, prefix reuse, preemption.
 *
 * One loop owns all state; between two steps it takes in what arrived (requests, aborts, fetched blocks), asks the
 * scheduler for the next step, runs it, and hands out the events. Results depend on a request alone under `invariant`
 * numerics: only blocks sealed by prefill are shared, and a resumed or preempted sequence replays its generated tokens
 * through decode rows.
 */
export class Engine {
  readonly runner: ModelRunner;
  readonly #options: EngineOptions;
  readonly #limits: SchedulerLimits;
  readonly #capacityTokens: number;
  readonly #pool: PagePool;
  readonly #table: SequenceTable;
  readonly #attempts = new AttemptRegistry();
  readonly #intake: PrefixIntake | undefined;
  readonly #counters = new EngineCounters();
  readonly #loop: Promise<void>;
  #events: GenerationEvent[] = [];
  #arrivals = 0;
  #violations: readonly string[] = [];
  #stepsSincePrefill = 0;
  #draining = false;
  #closed = false;
  /** What every request is told once the runner failed. */
  #failure: ClusterError | undefined;
  readonly #signal = new WakeSignal();
  readonly #reads: BlockReads;

  /** @throws ClusterError INVALID_ARGUMENT where the prefill budget does not hold one window. */
  constructor(options: EngineOptions) {
    this.#options = options;
    this.runner = options.runner;
    const { kv, limits } = options.runner;
    if (options.maxPrefillRows < kv.residualTokens || options.maxPrefillRows > limits.maxPrefillRows) {
      throw new ClusterError(
        "INVALID_ARGUMENT",
        `maxPrefillRows is ${options.maxPrefillRows}: it must be between residualTokens, ${kv.residualTokens}, and ${limits.maxPrefillRows}`,
      );
    }
    this.#limits = {
      residualTokens: kv.residualTokens,
      blockTokens: kv.blockTokens,
      maxPrefillRows: options.maxPrefillRows,
      maxSequences: limits.maxSequences,
      decodeStepsPerPrefill: options.decodeStepsPerPrefill,
    };
    const pages = Math.min(limits.numPages, limits.maxPagesPerSequence);
    // Sealed windows, and one in the residual that never has to be sealed.
    this.#capacityTokens = sealedPages(pages * kv.blockTokens, kv) * kv.blockTokens + kv.residualTokens - 1;
    this.#pool = new PagePool(limits.numPages);
    this.#reads = new BlockReads(this.#pool, options.runner);
    this.#table = new SequenceTable(this.#pool, kv, limits.maxSequences);
    if (options.transfer !== undefined) {
      this.#intake = new PrefixIntake({
        pool: this.#pool,
        runner: options.runner,
        kv,
        transfer: options.transfer,
        wake: () => this.#signal.wake(),
      });
    }
    this.#loop = this.#run();
  }

  /**
   * Takes a request; what becomes of it arrives as events, the last one "finished". A stale epoch ends as aborted at
   * once; an attempt that is here already is not taken twice.
   */
  submit(request: GenerationRequest): void {
    const admission = this.#attempts.submit(request.requestId, request.epoch);
    if (admission === "stale") {
      if (!this.#table.all.some((sequence) => sequence.id === sequenceId(request))) this.#refuse(request, "aborted");
      this.#signal.wake();
      return;
    }
    this.#abortOlder(request.requestId, request.epoch - 1);
    const { modelDigest, numerics } = this.#options;
    try {
      if (this.#failure !== undefined) throw this.#failure;
      if (this.#draining) throw new ClusterError("WORKER_DRAINING", "the worker is shutting down");
      checkRequest(request, this.runner.limits, this.#capacityTokens);
      const sequence = new Sequence({
        request,
        arrival: this.#arrivals++,
        modelDigest,
        kv: this.runner.kv,
        numerics,
      });
      sequence.aborted = admission === "aborted";
      this.#table.add(sequence);
    } catch (error) {
      this.#refuse(request, toClusterError(error));
    }
    this.#signal.wake();
  }

  /** Ends the attempts of a request up to `epoch`, within one step; remembered if the job is still on its way. */
  abort(requestId: string, epoch: number): void {
    this.#attempts.abort(requestId, epoch);
    this.#abortOlder(requestId, epoch);
    this.#signal.wake();
  }

  /** From now on nothing new starts: what has not produced a token yet fails with WORKER_DRAINING. */
  drain(): void {
    this.#draining = true;
    this.#signal.wake();
  }

  /** The payload of a block in the prefix index, or undefined; read between steps. */
  readBlock(id: string): Promise<Uint8Array | undefined> {
    if (this.#closed) return Promise.resolve(undefined);
    const payload = this.#reads.add(id);
    this.#signal.wake();
    return payload;
  }

  /** Ids of all blocks in the prefix index. */
  indexedBlocks(): string[] {
    return this.#pool.indexedIds();
  }

  /** Nothing runs or waits. */
  get idle(): boolean {
    return this.#table.all.length === 0;
  }

  /** @param check whether to check the pool's integrity now, which takes time with its size, or to repeat the last result. */
  stats(check = true): EngineStats {
    if (check) this.#violations = this.checkIntegrity();
    const waiting = this.#table.waiting;
    return {
      running: this.#table.running.length,
      waiting: waiting.length,
      waitingPromptTokens: waiting.reduce((sum, sequence) => sum + sequence.prefillEnd, 0),
      freePages: this.#pool.available,
      totalPages: this.#pool.numPages,
      referencedPages: this.#pool.referenced,
      indexedBlocks: this.#pool.indexed,
      evictedPages: this.#pool.evictions,
      integrityViolations: this.#violations,
      memory: this.runner.memory(),
      ...this.#counters.snapshot(),
    };
  }

  /** Everything that is wrong between pool, sequences and slots; empty if nothing is. */
  checkIntegrity(): string[] {
    const held = [...this.#table.heldPages(), ...this.#reads.held];
    return [...this.#pool.checkIntegrity(held), ...this.#table.checkIntegrity()];
  }

  /** Aborts everything, ends the loop, and closes the runner. */
  async close(): Promise<void> {
    this.#closed = true;
    this.#signal.wake();
    await this.#loop;
    await this.runner.close();
  }

  async #run(): Promise<void> {
    try {
      while (!this.#closed) {
        this.#intake?.settle();
        this.#endWhatMustEnd();
        await this.#reads.serve(this.#table.running.length > 0);
        this.#examineQueued();
        const planned = planStep({
          limits: this.#limits,
          running: this.#table.runningViews(),
          waiting: this.#table.waitingViews(),
          availablePages: this.#pool.available,
          stepsSincePrefill: this.#stepsSincePrefill,
        });
        const step = buildStep(planned, this.#table);
        this.#counters.preemptions += planned.preempt.length;
        if (step.parts.length > 0) await this.#step(step);
        this.#report();
        // With sequences at hand and nothing to run, pages are missing that a reader still holds.
        const idle = step.parts.length === 0 && planned.preempt.length === 0;
        if (idle) await this.#signal.sleep(this.#table.all.length > 0 ? stalledMs : undefined);
        else await new Promise((resolve) => setImmediate(resolve));
      }
      this.#end(this.#table.all, "aborted");
    } catch (error) {
      this.#fail(error instanceof Error ? error : new Error(String(error)));
    }
    this.#reads.close();
    this.#report();
  }

  async #step({ plan, parts }: BuiltStep): Promise<void> {
    const result = await within(this.runner.step(plan), stepTimeoutMs[this.runner.device.profile]);
    this.#counters.step(plan, result.seconds.wall);
    this.#stepsSincePrefill = plan.prefill.length > 0 ? 0 : this.#stepsSincePrefill + 1;
    const sampled = new Map(result.sampled.map((token) => [token.slot, token]));
    const sealed: SealedBlock[] = [];
    for (const part of parts) {
      const { sequence } = part;
      sequence.computed = part.end;
      if (result.nonFiniteSlots.includes(sequence.slot)) {
        this.#failSequence(sequence, new ClusterError("KV_NOT_FINITE", "the model produced NaN or infinity"));
        continue;
      }
      this.#indexSealed(part, sealed);
      if (part.samples && !sequence.aborted) this.#deliver(sequence, sampled.get(sequence.slot)!);
    }
    if (sealed.length > 0) this.#options.transfer?.sealed(sealed);
  }

  /** Enters the blocks that this step sealed into the prefix index, as far as others may use them. */
  #indexSealed({ sequence, start, end, phase }: StepPart, sealed: SealedBlock[]): void {
    const { kv } = this.runner;
    const last = Math.min(sealedPages(end, kv), sequence.shareableBlocks());
    const first = sealedPages(start, kv);
    if (first >= last) return;
    const ids = sequence.chain.ids(sequence.tokens, last);
    for (let index = first; index < last; index++) {
      const [id, parentId] = [ids[index]!, sequence.chain.parentOf(index)];
      if (this.#pool.index(sequence.pages[index]!, id, parentId)) sealed.push({ id, parentId, provenance: phase });
    }
  }

  #deliver(sequence: Sequence, sampled: SampledToken): void {
    const { request } = sequence;
    if (request.stopTokenIds.includes(sampled.token)) {
      this.#finish(sequence, "stopToken");
      return;
    }
    const index = sequence.generated;
    sequence.tokens.push(sampled.token);
    this.#events.push({
      type: "tokens",
      requestId: request.requestId,
      epoch: request.epoch,
      index,
      ids: [sampled.token],
      logprobs: [sampled.logprob],
      ...(sampled.logits === undefined ? {} : { firstLogits: sampled.logits }),
    });
    const room = Math.min(this.runner.limits.maxContextTokens, this.#capacityTokens) - sequence.tokens.length;
    if (sequence.generated >= request.maxTokens || room <= 0) this.#finish(sequence, "length");
  }

  /** Sequences queued first are looked at first, few more than can run: their missing blocks are fetched meanwhile. */
  #examineQueued(): void {
    let examined = 0;
    for (const sequence of this.#table.waiting) {
      if (examined >= this.#limits.maxSequences) return;
      examined += 1;
      if (sequence.state !== "queued") continue;
      const ids = sequence.shareableIds();
      const missing = ids[this.#pool.match(ids).length];
      // Somebody brings or computes the next block already: looking again then saves doing it twice.
      if (missing !== undefined && (this.#intake?.fetching(missing) || this.#computing(missing))) continue;
      const rate = this.#counters.prefillRate.value;
      if (missing === undefined || !this.#intake?.start(sequence, rate)) sequence.state = "ready";
    }
  }

  #computing(id: string): boolean {
    const { blockTokens } = this.runner.kv;
    return this.#table.running.some((sequence) => {
      if (!sequence.prefilling) return false;
      const shareable = sequence.chain.ids(sequence.tokens, sequence.shareableBlocks());
      return shareable.indexOf(id, sequence.computed / blockTokens) >= 0;
    });
  }

  #endWhatMustEnd(): void {
    const now = Date.now();
    const isLate = ({ request }: Sequence) => request.deadlineUnixMs > 0 && request.deadlineUnixMs <= now;
    for (const sequence of this.#table.all) {
      if (sequence.aborted) {
        this.#finish(sequence, "aborted");
      } else if (isLate(sequence)) {
        this.#failSequence(sequence, new ClusterError("DEADLINE_EXCEEDED", "the request's deadline passed"));
      } else if (this.#draining && sequence.state !== "running" && sequence.generated === 0) {
        this.#failSequence(sequence, new ClusterError("WORKER_DRAINING", "the worker is shutting down"));
      }
    }
  }

  #abortOlder(requestId: string, epoch: number): void {
    for (const sequence of this.#table.all) {
      const { request } = sequence;
      if (request.requestId === requestId && request.epoch <= epoch) sequence.aborted = true;
    }
  }

  #finish(sequence: Sequence, outcome: GenerationOutcome, error?: ClusterError): void {
    const { requestId, epoch } = sequence.request;
    const usage = sequence.usage();
    if (sequence.started) this.#counters.finished(usage.sources);
    this.#table.remove(sequence);
    this.#events.push({
      type: "finished",
      requestId,
      epoch,
      outcome,
      usage,
      ...(error === undefined ? {} : { error: { code: error.code, message: error.message } }),
    });
  }

  #failSequence(sequence: Sequence, error: ClusterError): void {
    this.#finish(sequence, "failed", error);
  }

  #end(sequences: readonly Sequence[], outcome: GenerationOutcome): void {
    for (const sequence of sequences) this.#finish(sequence, outcome);
  }

  /** Ends an attempt that never became a sequence. */
  #refuse({ requestId, epoch, promptTokens }: GenerationRequest, outcome: "aborted" | ClusterError): void {
    const sources = { gpu: 0, peer: 0, cachestore: 0, computed: promptTokens };
    const counts = { completionTokens: 0, kvF16Bytes: 0, kvStoredBytes: 0, fetchedBytes: 0 };
    const event = { type: "finished" as const, requestId, epoch, usage: { promptTokens, sources, ...counts } };
    if (outcome === "aborted") this.#events.push({ ...event, outcome });
    else this.#events.push({ ...event, outcome: "failed", error: { code: outcome.code, message: outcome.message } });
    if (this.#closed) this.#report();
  }

  #fail(error: Error): void {
    this.#closed = true;
    const { code, message } = toClusterError(error);
    const told = new ClusterError(code === "DEVICE_LOST" ? code : "WORKER_LOST", message, { cause: error });
    this.#failure = told;
    for (const sequence of this.#table.all) this.#failSequence(sequence, told);
    this.#options.onFailure?.(error);
  }

  #report(): void {
    const events = this.#events;
    this.#events = [];
    if (events.length > 0) this.#options.onEvents(events);
    const change = this.#pool.takeChanges();
    if (change.added.length + change.removed.length > 0) this.#options.onPrefixChange?.(change);
    this.#options.onStats?.();
  }
}
