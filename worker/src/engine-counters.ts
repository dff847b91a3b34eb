import type { EngineStats } from "./engine-stats.ts";
import { MeasuredRate } from "./fetch-choice.ts";
import type { TokenSources } from "./generation.ts";
import type { StepPlan, StepSeconds } from "./model/index.ts";

/** What an engine counts while it runs. */
export class EngineCounters {
  readonly prefillRate = new MeasuredRate();
  steps = 0;
  prefillTokens = 0;
  decodeTokens = 0;
  preemptions = 0;
  /** Seconds in which the engine's thread planned, encoded and handed out. */
  hostSeconds = 0;
  /** Of a decode step, measured last; 0 until known. */
  decodeStepSeconds = 0;
  readonly #seconds = { prefill: 0, decode: 0, mixed: 0 };
  #encodeSeconds = 0;
  #gpuSeconds = 0;
  #submits = 0;
  readonly #sources = { gpu: 0, peer: 0, cachestore: 0, computed: 0 };

  /** Notes a step. @param wall seconds from when the GPU was free for it. */
  step(plan: StepPlan, { encode, gpu }: StepSeconds, wall: number): void {
    const { decodeSteps = 1 } = plan;
    const rows = plan.prefill.reduce((sum, chunk) => sum + chunk.tokens.length, 0);
    const kind = plan.decode.length === 0 ? "prefill" : rows === 0 ? "decode" : "mixed";
    this.#seconds[kind] += wall;
    this.#encodeSeconds += encode;
    this.#gpuSeconds += gpu ?? 0;
    this.#submits += 1;
    this.steps += decodeSteps;
    this.prefillTokens += rows;
    this.decodeTokens += plan.decode.length * decodeSteps;
    if (kind === "prefill") this.prefillRate.add(rows, wall);
    if (kind === "decode") this.decodeStepSeconds = (gpu ?? wall) / decodeSteps;
  }

  /** Notes where the prompt of a finished request came from. */
  finished(sources: TokenSources): void {
    for (const name of ["gpu", "peer", "cachestore", "computed"] as const) this.#sources[name] += sources[name];
  }

  snapshot(): Pick<
    EngineStats,
    | "steps"
    | "prefillTokens"
    | "decodeTokens"
    | "preemptions"
    | "prefillTokensPerSecond"
    | "promptTokensBySource"
    | "stepSeconds"
    | "submits"
    | "submitSeconds"
  > {
    const { steps, prefillTokens, decodeTokens, preemptions } = this;
    return {
      steps,
      prefillTokens,
      decodeTokens,
      preemptions,
      prefillTokensPerSecond: this.prefillRate.value,
      promptTokensBySource: { ...this.#sources },
      stepSeconds: { ...this.#seconds },
      submits: this.#submits,
      submitSeconds: { host: this.hostSeconds, encode: this.#encodeSeconds, gpu: this.#gpuSeconds },
    };
  }
}
