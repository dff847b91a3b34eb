import type { EngineStats } from "./engine-stats.ts";
import { MeasuredRate } from "./fetch-choice.ts";
import type { TokenSources } from "./generation.ts";
import type { StepPlan } from "./model/index.ts";

/** What an engine counts while it runs. */
export class EngineCounters {
  readonly prefillRate = new MeasuredRate();
  steps = 0;
  prefillTokens = 0;
  decodeTokens = 0;
  preemptions = 0;
  readonly #seconds = { prefill: 0, decode: 0, mixed: 0 };
  readonly #sources = { gpu: 0, peer: 0, cachestore: 0, computed: 0 };

  /** Notes a step of `wall` seconds. */
  step(plan: StepPlan, wall: number): void {
    const rows = plan.prefill.reduce((sum, chunk) => sum + chunk.tokens.length, 0);
    const kind = plan.decode.length === 0 ? "prefill" : rows === 0 ? "decode" : "mixed";
    this.#seconds[kind] += wall;
    this.steps += 1;
    this.prefillTokens += rows;
    this.decodeTokens += plan.decode.length;
    if (kind === "prefill") this.prefillRate.add(rows, wall);
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
    };
  }
}
