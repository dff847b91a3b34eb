/** Sizes of an engine that keeps to a budget of GPU memory. */
import { activationType, DEFAULT_KV_FORMAT, type Gpu, openGpu } from "@kivimesh/kernels";
import {
  type EngineConfig,
  kvGeometry,
  type LoadedModel,
  type MemoryPlan,
  modelWeightBytes,
  planMemory,
} from "@kivimesh/worker";

const DEFAULT_WINDOW = 128;

/** Prompt tokens of a step where nobody says: enough for a GPU's matrix kernels, few for a software driver. */
const PREFILL_ROWS = { software: 128, hardware: 2048 } as const;

export interface BudgetRequest {
  readonly model: LoadedModel;
  /** What was asked for; sizes left out are planned. */
  readonly config: EngineConfig;
  readonly budgetBytes: number;
  /** Most sequences that are of use. */
  readonly wantedSequences: number;
  readonly maxContextTokens: number;
  /** Every sequence must fit at this length, all at once. */
  readonly tokensPerSequence: number;
}

export interface Budgeted {
  readonly config: EngineConfig;
  readonly plan: MemoryPlan;
}

function planOn(gpu: Gpu, request: BudgetRequest): Budgeted {
  const { model, config, budgetBytes, wantedSequences, maxContextTokens, tokensPerSequence } = request;
  const blockTokens = config.blockTokens ?? DEFAULT_WINDOW;
  const residualTokens = config.residualTokens ?? Math.max(DEFAULT_WINDOW, blockTokens);
  const maxPrefillRows = config.maxPrefillRows ?? Math.max(PREFILL_ROWS[gpu.profile], residualTokens);
  const plan = planMemory({
    budgetBytes,
    config: model.config,
    kv: kvGeometry(model.config, config.kvFormat ?? DEFAULT_KV_FORMAT, blockTokens, residualTokens),
    weightBytes: modelWeightBytes(model),
    maxPrefillRows,
    maxContextTokens,
    tokensPerSequence,
    activations: activationType(gpu),
    device: gpu.device.limits,
    profile: gpu.profile,
    maxSequences: wantedSequences,
  });
  const { maxSequences, kvBytes } = plan;
  return {
    plan,
    config: { ...config, blockTokens, residualTokens, maxPrefillRows, maxContextTokens, maxSequences, kvBytes },
  };
}

/**
 * Plans for the GPU that the engine will open.
 * @throws ClusterError INVALID_ARGUMENT where the budget does not hold one sequence.
 */
export async function budgetedConfig(request: BudgetRequest): Promise<Budgeted> {
  const { gpuAdapter } = request.config;
  const gpu = await openGpu(gpuAdapter === undefined ? {} : { adapter: gpuAdapter });
  try {
    return planOn(gpu, request);
  } finally {
    await gpu.close();
  }
}
