/** Models and the runner that executes them. */

export type {
  DecodeRow,
  KvGeometry,
  ModelRunner,
  OpenModelRunnerOptions,
  PrefillChunk,
  RunnerLimits,
  RunnerMemory,
  SampledToken,
  SamplingParameters,
  StepPlan,
  StepResult,
} from "../model-runner/model-runner.ts";
export { openModelRunner } from "../model-runner/open-model-runner.ts";
export { type PerplexityOptions, type PerplexityResult, textPerplexity } from "../model-runner/perplexity.ts";
export { DUMMY_ARCHITECTURES } from "./dummy-model.ts";
export { loadModel } from "./load-model.ts";
export type { LoadedModel, ModelSource, ModelTensor, TokenizerDefinition } from "./loaded-model.ts";
export type { ModelConfig, RopeConfig } from "./model-config.ts";
