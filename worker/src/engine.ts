import type { EngineStats } from "./engine-stats.ts";
import type { GenerationEvent, GenerationRequest } from "./generation.ts";
import type { ModelRunner } from "./model/index.ts";

/** Runs generation requests on one model runner: continuous batching, prefix reuse, sampling. */
export interface Engine {
  readonly runner: ModelRunner;
  /** Events reach the listener of `openEngine`, or of `generate`. */
  submit(request: GenerationRequest): void;
  /** Ends attempts of the request up to this epoch, within one step. */
  abort(requestId: string, epoch: number): void;
  stats(): EngineStats;
  onEvents(listener: (events: readonly GenerationEvent[]) => void): void;
  close(): Promise<void>;
}
