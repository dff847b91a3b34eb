/** An engine in this thread, for benches, evaluation and tests. */
import type { EngineConfig } from "./config.ts";
import type { Engine } from "./engine.ts";
import type { GenerationEvent } from "./generation.ts";
import type { LoadedModel, ModelRunner, SamplingParameters } from "./model/index.ts";

/** A generation by token ids; what is left out is greedy, unshared and unlimited in time. */
export interface SimpleGeneration {
  readonly tokens: ArrayLike<number>;
  /** New tokens, at most. */
  readonly maxTokens: number;
  readonly sampling?: Partial<SamplingParameters>;
  readonly stopTokenIds?: readonly number[];
  readonly returnFirstLogits?: boolean;
  /** Part of every block id; default 32 zero bytes. */
  readonly tenantNamespace?: Uint8Array;
  readonly requestId?: string;
  readonly epoch?: number;
  /** Default: all of `tokens`. */
  readonly promptTokens?: number;
}

export interface OpenEngine extends Engine {
  readonly model: LoadedModel;
  readonly runner: ModelRunner;
  /** Events of one request; ends after "finished". Leaving the loop early aborts the request. */
  generate(request: SimpleGeneration): AsyncGenerator<GenerationEvent, void, undefined>;
}

/** Loads a model onto the GPU and starts an engine over it. @throws ClusterError as `loadModel` and `openModelRunner`. */
export async function openEngine(
  config: EngineConfig,
  _onProgress?: (done: number, total: number) => void,
): Promise<OpenEngine> {
  throw new RangeError(`cannot open ${config.modelPath ?? config.dummyArchitecture} yet`);
}
