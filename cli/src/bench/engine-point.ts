/** Prefill and decode of a batch of equal prompts, apart: one point of `kivimesh bench engine`. */
import type { EngineSession } from "./engine-session.ts";
import { type MemoryBreakdown, memoryBreakdown } from "./memory-breakdown.ts";
import { type DecodeStepCost, decodeStepCost } from "./metered-runner.ts";
import { type Percentiles, percentiles } from "./percentiles.ts";
import { TokenGaps } from "./token-gaps.ts";
import { benchPrompt } from "./workload.ts";

export interface EnginePoint {
  readonly batch: number;
  /** Tokens of each prompt. */
  readonly promptTokens: number;
  /** Tokens of each answer that are counted. */
  readonly outputTokens: number;
}

export interface EnginePointResult extends EnginePoint {
  readonly device: string;
  readonly model: string;
  readonly kvFormat: string;
  /** All prompts' tokens over the time until every sequence has its first token. */
  readonly prefillTokensPerSecond: number;
  /** Tokens of all sequences while every one of them decodes. */
  readonly decodeTokensPerSecond: number;
  /** Until the last sequence's first token. */
  readonly ttftSeconds: number;
  /** Prefill and decode together. */
  readonly totalSeconds: number;
  /** Milliseconds between two tokens of a sequence while every one decodes. */
  readonly interTokenMs?: Percentiles;
  readonly decodeStep?: DecodeStepCost;
  readonly peakGpuBytes: MemoryBreakdown;
}

/** When each token of each sequence came, in milliseconds of `performance.now()`. */
type TokenTimes = readonly (readonly number[])[];

interface Run {
  readonly started: number;
  readonly times: TokenTimes;
}

/**
 * Starts all prompts at once and waits until all have ended.
 * @param enough ends them when each has had so many tokens since the last one's first.
 */
async function run(
  session: EngineSession,
  name: string,
  prompts: readonly Uint32Array[],
  maxTokens: number,
  enough = Number.POSITIVE_INFINITY,
): Promise<Run> {
  session.steps.length = 0;
  const times = prompts.map((): number[] => []);
  const counted = prompts.map(() => 0);
  let [joined, done] = [0, 0];
  const note = (index: number, count: number, at: number) => {
    const mine = times[index] as number[];
    const isJoined = joined === prompts.length;
    if (mine.length === 0) joined += 1;
    for (let token = 0; token < count; token++) mine.push(at);
    const before = counted[index] as number;
    if (!isJoined || before >= enough) return;
    counted[index] = before + count;
    if (before + count >= enough) done += 1;
    if (done === prompts.length) for (let other = 0; other < done; other++) session.abort(`${name}-${other}`);
  };
  const started = performance.now();
  const ended = prompts.map((tokens, index) => {
    return new Promise<void>((onEnd) => {
      session.submit({
        id: `${name}-${index}`,
        tokens,
        maxTokens,
        onTokens: (count, at) => note(index, count, at),
        onEnd,
      });
    });
  });
  await Promise.race([Promise.all(ended), session.failure]);
  return { started, times };
}

/** Figures of the part in which every sequence decodes: from the last first token until one of them has all its tokens. */
export function decodeRates(
  times: TokenTimes,
  outputTokens: number,
): { readonly tokensPerSecond: number; readonly seconds: number; readonly gaps: readonly number[] } {
  const from = Math.max(...times.map((sequence) => sequence[0] ?? Number.POSITIVE_INFINITY));
  const to = Math.min(
    ...times.map((sequence) => {
      const before = sequence.filter((time) => time <= from).length;
      return sequence[Math.min(before + outputTokens, sequence.length) - 1] ?? from;
    }),
  );
  const inside = times.map((sequence) => sequence.filter((time) => time > from && time <= to));
  const seconds = Math.max(0, to - from) / 1000;
  const tokens = inside.reduce((sum, sequence) => sum + sequence.length, 0);
  const gaps: number[] = [];
  for (const sequence of inside) {
    const mine = new TokenGaps(gaps);
    for (const time of sequence) mine.add(1, time);
  }
  return { tokensPerSecond: seconds > 0 ? tokens / seconds : 0, seconds, gaps };
}

/** Steps that the engine may have planned before it hears of a new sequence. */
const DECODE_AHEAD = 20;

/**
 * Tokens that a sequence of this point may reach: decoding goes on until the last one of the batch has joined in. The
 * prompts' blocks are found by then, so that each sequence has two windows to compute at most.
 */
export function sequenceTokens({ batch, promptTokens, outputTokens }: EnginePoint): number {
  return promptTokens + outputTokens + 4 * batch + DECODE_AHEAD;
}

let points = 0;

/** Prefills the batch, then decodes it: the same prompts again, whose sealed blocks are found. */
export async function measurePoint(session: EngineSession, point: EnginePoint): Promise<EnginePointResult> {
  const { batch, promptTokens, outputTokens } = point;
  const { runner, steps } = session;
  const { vocabulary, maxContextTokens } = runner.limits;
  const name = `point-${points++}`;
  const prompt = (index: number, length: number) => benchPrompt(points * 2000 + index, length, vocabulary);
  const warm = [prompt(1500, Math.min(promptTokens, runner.kv.residualTokens + 1))];
  await run(session, `${name}-warm`, warm, 2);
  const prompts = Array.from({ length: batch }, (_, index) => prompt(index, promptTokens));
  const prefill = await run(session, `${name}-prefill`, prompts, 1);
  const ttftSeconds = (Math.max(...prefill.times.map(([first]) => first ?? 0)) - prefill.started) / 1000;
  const most = Math.min(sequenceTokens(point), maxContextTokens) - promptTokens;
  const decode = await run(session, `${name}-decode`, prompts, most, outputTokens);
  const rates = decodeRates(decode.times, outputTokens);
  const interTokenMs = percentiles(rates.gaps);
  const decodeStep = decodeStepCost(steps.filter(({ decodeRows }) => decodeRows === batch));
  return {
    device: runner.device.name,
    model: session.model.name,
    kvFormat: runner.kv.format.name,
    ...point,
    prefillTokensPerSecond: (batch * promptTokens) / ttftSeconds,
    decodeTokensPerSecond: rates.tokensPerSecond,
    ttftSeconds,
    totalSeconds: ttftSeconds + rates.seconds,
    ...(interTokenMs === undefined ? {} : { interTokenMs }),
    ...(decodeStep === undefined ? {} : { decodeStep }),
    peakGpuBytes: memoryBreakdown(runner),
  };
}
