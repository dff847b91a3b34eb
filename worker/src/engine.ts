import { ClusterError, toClusterError } from "@kivimesh/proto";
import { AttemptRegistry } from "./attempt-registry.ts";
import { BlockReads } from "./block-reads.ts";
import type { SealedBlock } from "./block-transfer.ts";
import { EngineCounters } from "./engine-counters.ts";
import { checkEngineOptions, type EngineOptions } from "./engine-options.ts";
import { type EndedStep, EnginePipeline } from "./engine-pipeline.ts";
import type { EngineStats } from "./engine-stats.ts";
import { buildStep, type StepPart } from "./engine-step.ts";
import type { GenerationEvent, GenerationOutcome, GenerationRequest } from "./generation.ts";
import type { ModelRunner, SampledToken } from "./model/index.ts";
import { PagePool } from "./page-pool.ts";
import { PrefixIntake } from "./prefix-intake.ts";
import { examineQueued } from "./queued-sequences.ts";
import { checkRequest } from "./request-check.ts";
import { planStep, type SchedulerLimits, sealedPages } from "./scheduler.ts";
import { Sequence, sequenceId } from "./sequence.ts";
import { SequenceTable } from "./sequence-table.ts";
import { WakeSignal } from "./wake-signal.ts";

/** How long an engine that cannot run a step waits for pages or blocks before it looks again, in milliseconds. */
const stalledMs = 20;

/**
 * Runs generation requests on one model runner: continuous batching, chunked prefill, prefix reuse, preemption.
 *
 * One loop owns all state; between two steps it takes in what arrived (requests, aborts, fetched blocks), asks the
 * scheduler for the next step, hands it to the runner, and hands out the events of those that ended. Steps are planned
 * ahead of results: sampled tokens stay on the GPU, so a row can go on before its last token was read. What was computed
 * for a sequence that turns out to have ended is dropped; its slot and pages can be given away at once, because the GPU
 * runs steps in order and whoever gets them writes before it reads. Results depend on a request alone under `invariant`
 * numerics: only blocks sealed by prefill are shared, and tokens of an earlier run are replayed through decode rows.
 */
export class Engine {
  readonly runner: ModelRunner;
  readonly #options: EngineOptions;
  readonly #limits: Omit<SchedulerLimits, "decodeSteps">;
  readonly #capacityTokens: number;
  /** Tokens of the longest sequence that context and pool allow. */
  readonly #longest: number;
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
  readonly #pipeline: EnginePipeline;

  /** @throws ClusterError INVALID_ARGUMENT; see checkEngineOptions. */
  constructor(options: EngineOptions) {
    this.#options = options;
    this.runner = options.runner;
    const { kv, limits } = options.runner;
    checkEngineOptions(options);
    this.#limits = {
      residualTokens: kv.residualTokens,
      blockTokens: kv.blockTokens,
      maxPrefillRows: options.maxPrefillRows,
      maxSequences: limits.maxSequences,
      decodeStepsPerPrefill: options.decodeStepsPerPrefill,
      prefillPatience: options.prefillPatience,
    };
    const pages = Math.min(limits.numPages, limits.maxPagesPerSequence);
    // Sealed windows, and one in the residual that never has to be sealed.
    this.#capacityTokens = sealedPages(pages * kv.blockTokens, kv) * kv.blockTokens + kv.residualTokens - 1;
    this.#longest = Math.min(limits.maxContextTokens, this.#capacityTokens);
    this.#pool = new PagePool(limits.numPages);
    this.#reads = new BlockReads(this.#pool, options.runner, () => this.#signal.wake());
    this.#pipeline = new EnginePipeline(options.runner);
    this.#table = new SequenceTable(this.#pool, kv, limits.maxSequences, this.#longest);
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
      while (!this.#closed) await this.#turn();
      this.#end(this.#table.all, "aborted");
    } catch (error) {
      this.#fail(error instanceof Error ? error : new Error(String(error)));
    }
    await this.#pipeline.drop();
    await this.#reads.close();
    this.#report();
  }

  /** Takes in what arrived and what ended, starts the next step if there is room for one, and waits for either. */
  async #turn(): Promise<void> {
    const pipeline = this.#pipeline;
    while (pipeline.ended) this.#takeResult(await pipeline.take());
    const began = performance.now();
    this.#intake?.settle();
    this.#endWhatMustEnd();
    this.#reads.serve(this.#table.running.length > 0);
    examineQueued({
      table: this.#table,
      pool: this.#pool,
      intake: this.#intake,
      limits: this.#limits,
      prefillTokensPerSecond: this.#counters.prefillRate.value,
    });
    const roomy = pipeline.length < this.#options.submitsInFlight;
    const started = roomy && this.#startStep();
    this.#report();
    this.#counters.hostSeconds += (performance.now() - began) / 1000;
    if (pipeline.length >= this.#options.submitsInFlight) {
      this.#takeResult(await pipeline.take());
    } else if (started) {
      await new Promise((resolve) => setImmediate(resolve));
    } else {
      // With sequences at hand and nothing to run, pages are missing that a reader still holds.
      const stalled = pipeline.length === 0 && this.#table.all.length > 0;
      await this.#signal.sleep(stalled ? stalledMs : undefined, pipeline.oldest);
    }
  }

  /** Plans the next step and hands it to the runner; false where nothing can run now. */
  #startStep(): boolean {
    const planned = planStep({
      limits: { ...this.#limits, decodeSteps: this.#decodeSteps() },
      running: this.#table.runningViews(),
      waiting: this.#table.waitingViews(),
      availablePages: this.#pool.available,
      stepsSincePrefill: this.#stepsSincePrefill,
    });
    // Who is preempted must know all its tokens.
    if (planned.preempt.length > 0 && this.#pipeline.length > 0) return false;
    const step = buildStep(planned, this.#table);
    this.#counters.preemptions += planned.preempt.length;
    if (step.parts.length === 0) return planned.preempt.length > 0;
    this.#stepsSincePrefill = step.plan.prefill.length > 0 ? 0 : this.#stepsSincePrefill + planned.decodeSteps;
    this.#pipeline.start(step);
    return true;
  }

  /** Steps of decode rows in one submit: as many as end within the latency limit. */
  #decodeSteps(): number {
    const { decodeStepsPerSubmit, submitLatencyMs } = this.#options;
    if (!Number.isFinite(submitLatencyMs)) return decodeStepsPerSubmit;
    const seconds = this.#counters.decodeStepSeconds;
    if (seconds === 0) return 1;
    return Math.max(1, Math.min(decodeStepsPerSubmit, Math.floor(submitLatencyMs / 1000 / seconds)));
  }

  /** Hands out what a step brought. Sequences that ended meanwhile get nothing: what was computed for them is dropped. */
  #takeResult({ step, result, seconds }: EndedStep): void {
    const began = performance.now();
    const { plan, parts } = step;
    this.#counters.step(plan, result.seconds, seconds);
    const failed = new Set(result.nonFiniteSlots);
    const sealed: SealedBlock[] = [];
    const rows = plan.decode.length;
    const prefilled = result.sampled.length - rows * (plan.decodeSteps ?? 1);
    let prefillRow = 0;
    let decodeRow = prefilled;
    for (const part of parts) {
      const first = part.phase === "decode" ? decodeRow++ : prefillRow;
      if (part.phase === "prefill") prefillRow += part.samples;
      const { sequence } = part;
      if (sequence.state !== "running") continue;
      sequence.unread -= part.samples;
      if (failed.has(part.slot)) {
        this.#failSequence(sequence, new ClusterError("KV_NOT_FINITE", "the model produced NaN or infinity"));
        continue;
      }
      const sampled: SampledToken[] = [];
      for (let index = 0; index < part.samples; index++) sampled.push(result.sampled[first + index * rows]!);
      this.#deliver(part, sampled, sealed);
    }
    if (sealed.length > 0) this.#options.transfer?.sealed(sealed);
    this.#counters.hostSeconds += (performance.now() - began) / 1000;
  }

  /** Enters the blocks that this step sealed into the prefix index, as far as others may use them. */
  #indexSealed({ sequence, start, phase }: StepPart, end: number, sealed: SealedBlock[]): void {
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

  /** Appends sampled tokens up to the sequence's end; those behind a stop token are dropped, and so is their KV. */
  #deliver(part: StepPart, sampled: readonly SampledToken[], sealed: SealedBlock[]): void {
    const { sequence } = part;
    const { request } = sequence;
    const index = sequence.generated;
    const ids: number[] = [];
    const logprobs: number[] = [];
    let outcome: GenerationOutcome | undefined;
    for (const { token, logprob } of sequence.aborted ? [] : sampled) {
      if (request.stopTokenIds.includes(token)) outcome = "stopToken";
      if (outcome !== undefined) break;
      sequence.tokens.push(token);
      ids.push(token);
      logprobs.push(logprob);
      if (sequence.generated >= request.maxTokens || sequence.tokens.length >= this.#longest) outcome = "length";
    }
    sequence.computed = Math.min(part.end, sequence.tokens.length);
    this.#indexSealed(part, sequence.computed, sealed);
    if (ids.length > 0) {
      const { requestId, epoch } = request;
      const firstLogits = sampled[0]?.logits;
      const event = { type: "tokens", requestId, epoch, index, ids, logprobs } as const;
      this.#events.push(firstLogits === undefined ? event : { ...event, firstLogits });
    }
    if (outcome !== undefined) this.#finish(sequence, outcome);
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
