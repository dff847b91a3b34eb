/** Output tokens a second of one engine under a workload whose requests are all there: what a batch job would see. */
import type { EngineSession } from "./engine-session.ts";
import { type MemoryBreakdown, memoryBreakdown } from "./memory-breakdown.ts";
import { type DecodeStepCost, decodeStepCost } from "./metered-runner.ts";
import { type Percentiles, percentiles } from "./percentiles.ts";
import { TokenGaps } from "./token-gaps.ts";
import { benchPrompt, type Workload, workloadName } from "./workload.ts";

export interface ThroughputResult {
  readonly workload: string;
  /** `whole`: from the first request's start to the last one's end. `steady`: a part in which the batch was always full. */
  readonly measured: "whole" | "steady";
  /** Length of what was measured. */
  readonly seconds: number;
  readonly outputTokens: number;
  /** Prefill of the requests included. */
  readonly outputTokensPerSecond: number;
  /** Prompt tokens computed meanwhile. */
  readonly promptTokens: number;
  /** Most sequences that decoded in one step. */
  readonly largestBatch: number;
  /** Tokens that the sealed pages hold at once. */
  readonly kvCapacityTokens: number;
  /** Sequences that can run at once. */
  readonly maxSequences: number;
  /** Newest tokens of each that are kept beside the pages, as f16. */
  readonly residualTokens: number;
  /** Sequences thrown out and started again, for want of pages. */
  readonly preemptions: number;
  /** Milliseconds between the tokens of one sequence; tokens that arrive together share the time since the last ones. */
  readonly interTokenMs?: Percentiles;
  readonly decodeStep?: DecodeStepCost;
  readonly peakGpuBytes: MemoryBreakdown;
}

/** Counts tokens as they arrive, in all and since `begin`. */
class Arrivals {
  readonly gaps: number[] = [];
  tokens = 0;
  #started = performance.now();

  /** Forgets what was counted: the measured part begins. */
  begin(): void {
    this.gaps.length = 0;
    this.tokens = 0;
    this.#started = performance.now();
  }

  get seconds(): number {
    return (performance.now() - this.#started) / 1000;
  }

  /** Listener of one request. */
  listener(onFirst?: () => void): (count: number, at: number) => void {
    const gaps = new TokenGaps(this.gaps);
    let isFirst = true;
    return (count, at) => {
      this.tokens += count;
      gaps.add(count, at);
      if (isFirst) onFirst?.();
      isFirst = false;
    };
  }
}

function summary(session: EngineSession, arrivals: Arrivals, measured: "whole" | "steady", preemptionsBefore: number) {
  const { runner, steps } = session;
  const { seconds, tokens, gaps } = arrivals;
  const interTokenMs = percentiles(gaps);
  const decodeStep = decodeStepCost(steps);
  return {
    measured,
    seconds,
    outputTokens: tokens,
    outputTokensPerSecond: tokens / seconds,
    promptTokens: steps.reduce((sum, { prefillRows }) => sum + prefillRows, 0),
    largestBatch: steps.reduce((most, { decodeRows }) => Math.max(most, decodeRows), 0),
    kvCapacityTokens: runner.limits.numPages * runner.kv.blockTokens,
    maxSequences: runner.limits.maxSequences,
    residualTokens: runner.kv.residualTokens,
    preemptions: session.preemptions() - preemptionsBefore,
    ...(interTokenMs === undefined ? {} : { interTokenMs }),
    ...(decodeStep === undefined ? {} : { decodeStep }),
    peakGpuBytes: memoryBreakdown(runner),
  };
}

/** Requests of one session must not share ids: an aborted id stays aborted. */
let runs = 0;

/** Output tokens so far, and seconds since the start. */
export type ThroughputProgress = (tokens: number, seconds: number) => void;

const PROGRESS_MILLISECONDS = 1000;

/** All requests at once; until the last one ends. */
async function runWhole(
  session: EngineSession,
  workload: Workload,
  onProgress: ThroughputProgress,
): Promise<ThroughputResult> {
  const { requests, promptTokens, outputTokens } = workload;
  const { vocabulary } = session.runner.limits;
  const prompts = Array.from({ length: requests }, (_, index) => benchPrompt(index + 1, promptTokens, vocabulary));
  const arrivals = new Arrivals();
  const preemptions = session.preemptions();
  const run = runs++;
  session.steps.length = 0;
  arrivals.begin();
  const ended = prompts.map(
    (tokens, index) =>
      new Promise<void>((resolve) => {
        session.submit({
          id: `whole-${run}-${index}`,
          tokens,
          maxTokens: outputTokens,
          onTokens: arrivals.listener(),
          onEnd: resolve,
        });
      }),
  );
  const progress = setInterval(() => onProgress(arrivals.tokens, arrivals.seconds), PROGRESS_MILLISECONDS);
  try {
    await Promise.race([Promise.all(ended), session.failure]);
  } finally {
    clearInterval(progress);
  }
  return { workload: workloadName(workload), ...summary(session, arrivals, "whole", preemptions) };
}

/** Bit reversal spreads consecutive indices over 0 … 1, so that any few of them are spread too. */
function spread(index: number): number {
  let bits = index;
  let value = 0;
  for (let weight = 0.5; bits > 0; weight /= 2, bits >>= 1) value += (bits & 1) * weight;
  return value;
}

/**
 * The same workload without its beginning and end: the first requests stand at different points of their answers, each that
 * ends is followed by a new one, and what is measured begins when every one of the first has its first token.
 */
async function runSteady(session: EngineSession, workload: Workload, seconds: number): Promise<ThroughputResult> {
  const { requests, promptTokens, outputTokens } = workload;
  const { runner } = session;
  const { vocabulary, maxSequences, numPages } = runner.limits;
  const held = Math.ceil((promptTokens + outputTokens) / runner.kv.residualTokens) * runner.kv.residualTokens;
  const batch = Math.max(1, Math.min(requests, maxSequences, Math.floor((numPages * runner.kv.blockTokens) / held)));
  const arrivals = new Arrivals();
  const preemptions = session.preemptions();
  const run = runs++;
  const live = new Set<string>();
  let submitted = 0;
  /** Set when the measured part is over; called when nothing runs any more. */
  let onIdle: (() => void) | undefined;
  const submit = (age: number, onFirst?: () => void) => {
    const index = submitted++;
    const id = `steady-${run}-${index}`;
    live.add(id);
    session.submit({
      id,
      tokens: benchPrompt(index + 1, promptTokens + age, vocabulary),
      maxTokens: outputTokens - age,
      onTokens: arrivals.listener(onFirst),
      onEnd() {
        live.delete(id);
        if (onIdle === undefined) submit(0);
        else if (live.size === 0) onIdle();
      },
    });
  };
  const first = Array.from(
    { length: batch },
    (_, index) =>
      new Promise<void>((resolve) => {
        submit(Math.floor(spread(index) * outputTokens), resolve);
      }),
  );
  // A few more than run at once: the queue must never be empty.
  for (let index = 0; index < Math.min(batch, requests - batch); index++) submit(0);
  await Promise.race([Promise.all(first), session.failure]);
  session.steps.length = 0;
  arrivals.begin();
  const timer = new Promise<void>((resolve) => {
    setTimeout(resolve, seconds * 1000);
  });
  await Promise.race([timer, session.failure]);
  const result = { workload: workloadName(workload), ...summary(session, arrivals, "steady", preemptions) };
  const idle = new Promise<void>((resolve) => {
    onIdle = resolve;
  });
  for (const id of live) session.abort(id);
  await Promise.race([idle, session.failure]);
  return result;
}

/**
 * @param seconds measures so long in steady state; undefined: the whole workload.
 * @param onProgress of a whole workload, once a second.
 */
export function measureThroughput(
  session: EngineSession,
  workload: Workload,
  seconds: number | undefined,
  onProgress: ThroughputProgress = () => undefined,
): Promise<ThroughputResult> {
  return seconds === undefined ? runWhole(session, workload, onProgress) : runSteady(session, workload, seconds);
}
