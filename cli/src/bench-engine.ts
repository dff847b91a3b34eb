/** Measures one engine: a batch of prompts that start together, prefill and decode apart. */
import type { GenerationEvent, OpenEngine } from "@kivimesh/worker";

export interface EngineBenchOptions {
  readonly batch: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
}

export interface EngineBenchResult {
  readonly device: string;
  readonly model: string;
  readonly kvFormat: string;
  readonly batch: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
  /** All prompts' tokens over the time until every sequence has its first token. */
  readonly prefillTokensPerSecond: number;
  /** Tokens after that, of all sequences, over the rest of the time. */
  readonly decodeTokensPerSecond: number;
  /** Until the last sequence's first token. */
  readonly ttftSeconds: number;
  readonly totalSeconds: number;
  readonly peakGpuBytes: {
    readonly weights: number;
    readonly kv: number;
    readonly activations: number;
    readonly other: number;
  };
}

/** Token ids that no two prompts share, so that no prefix is found again. Multiplicative hash of Knuth, vol. 3, §6.4. */
export function benchPrompt(seed: number, length: number, vocabulary: number): Uint32Array {
  return Uint32Array.from(
    { length },
    (_, index) => (Math.imul(seed * 65_537 + index + 1, 2_654_435_761) >>> 8) % vocabulary,
  );
}

/** When each token arrived, in seconds since the start. */
async function arrivals(events: AsyncIterable<GenerationEvent>, since: number): Promise<number[]> {
  const times: number[] = [];
  for await (const event of events) {
    const now = (performance.now() - since) / 1000;
    if (event.type === "tokens") times.push(...event.ids.map(() => now));
    else if (event.outcome === "failed") throw new Error(`${event.error?.code}: ${event.error?.message}`);
  }
  return times;
}

async function runBatch(engine: OpenEngine, options: EngineBenchOptions, firstSeed: number): Promise<number[][]> {
  const since = performance.now();
  const { vocabulary } = engine.runner.limits;
  return Promise.all(
    Array.from({ length: options.batch }, (_, index) => {
      const tokens = benchPrompt(firstSeed + index, options.promptTokens, vocabulary);
      return arrivals(
        engine.generate({ tokens, maxTokens: options.outputTokens, requestId: `bench-${firstSeed + index}` }),
        since,
      );
    }),
  );
}

/** Rates of a batch from the arrival times of each sequence's tokens. */
export function ratesOf(times: readonly (readonly number[])[], promptTokens: number) {
  const ttftSeconds = Math.max(...times.map((sequence) => sequence[0] ?? 0));
  const totalSeconds = Math.max(...times.map((sequence) => sequence.at(-1) ?? 0));
  const decoded = times.flat().filter((time) => time > ttftSeconds).length;
  return {
    prefillTokensPerSecond: (times.length * promptTokens) / ttftSeconds,
    decodeTokensPerSecond: decoded === 0 ? 0 : decoded / (totalSeconds - ttftSeconds),
    ttftSeconds,
    totalSeconds,
  };
}

/** A warm-up (every kernel compiled), then one measured batch. */
export async function benchEngine(engine: OpenEngine, options: EngineBenchOptions): Promise<EngineBenchResult> {
  const warmUp = {
    ...options,
    promptTokens: Math.min(options.promptTokens, engine.runner.kv.residualTokens + 1),
    outputTokens: 2,
  };
  await runBatch(engine, warmUp, 1);
  const times = await runBatch(engine, options, 1 + options.batch);
  return {
    device: engine.runner.device.name,
    model: engine.model.name,
    kvFormat: engine.runner.kv.format.name,
    ...options,
    ...ratesOf(times, options.promptTokens),
    peakGpuBytes: engine.runner.memory(),
  };
}
