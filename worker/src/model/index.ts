/** Models and the runner that executes them. */

export { kvGeometry } from "../model-runner/kv-geometry.ts";
export {
  type MemoryPlan,
  type MemoryPlanLimit,
  type MemoryPlanRequest,
  modelWeightBytes,
  type PlannedMemory,
  planMemory,
} from "../model-runner/memory-plan.ts";
export type {
  DecodeRow,
  KvGeometry,
  ModelRunner,
  OpenModelRunnerOptions,
  PrefillChunk,
  RunnerDevice,
  RunnerLimits,
  RunnerMemory,
  SampledToken,
  SamplingParameters,
  StepPlan,
  StepResult,
  StepSeconds,
} from "../model-runner/model-runner.ts";
export { openModelRunner } from "../model-runner/open-model-runner.ts";
export { textPerplexity } from "../model-runner/perplexity.ts";
export { loadModel } from "./load-model.ts";
export type { LoadedModel, ModelSource, TokenizerDefinition } from "./loaded-model.ts";
export type { ModelConfig } from "./model-config.ts";
