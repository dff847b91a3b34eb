/** The worker: an engine over the GPU and the service that feeds it. */
export {
  checkWorkerConfig,
  type EngineConfig,
  type Numerics,
  type WorkerConfig,
} from "./config.ts";
export { Engine } from "./engine.ts";
export type { EngineOptions } from "./engine-options.ts";
export type { EngineStats } from "./engine-stats.ts";
export {
  type FinishedEvent,
  type GenerationEvent,
  type GenerationOutcome,
  type GenerationRequest,
  type GenerationUsage,
  greedySampling,
  type TokenSources,
  type TokensEvent,
} from "./generation.ts";
export {
  type DecodeRow,
  type KvGeometry,
  kvGeometry,
  type LoadedModel,
  loadModel,
  type MemoryPlan,
  type MemoryPlanLimit,
  type MemoryPlanRequest,
  type ModelConfig,
  type ModelRunner,
  type ModelSource,
  modelWeightBytes,
  type OpenModelRunnerOptions,
  openModelRunner,
  type PlannedMemory,
  type PrefillChunk,
  planMemory,
  type RunnerDevice,
  type RunnerLimits,
  type RunnerMemory,
  type SamplingParameters,
  type StepPlan,
  type StepResult,
  type TokenizerDefinition,
  textPerplexity,
} from "./model/index.ts";
export {
  type EngineParts,
  type OpenEngine,
  openEngine,
  openEngineParts,
  type SimpleGeneration,
} from "./open-engine.ts";
export { startWorker, type WorkerSeams, type WorkerService } from "./worker.ts";
