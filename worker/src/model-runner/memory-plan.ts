/** How many sequences and pages a budget of GPU memory holds, before anything is opened. */
import {
  type ActivationType,
  type DeviceProfile,
  FEEDBACK_ROW_WORDS,
  SAMPLE_PARAMETER_BYTES,
  SAMPLE_RESULT_BYTES,
} from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { LoadedModel } from "../model/loaded-model.ts";
import type { ModelConfig } from "../model/model-config.ts";
import { activationBytes } from "./activations.ts";
import type { BufferLimits } from "./kv-geometry.ts";
import { logitsRows } from "./logits-rows.ts";
import type { KvGeometry } from "./model-runner.ts";

const MEBIBYTE = 1 << 20;
/** Driver, pipelines and upload staging. */
const DEFAULT_RESERVED_BYTES = 512 * MEBIBYTE;
const DEFAULT_MAX_SEQUENCES = 4096;
/** Partial sums of split kernels: each kind stays within this. */
const PARTIALS_BYTES = 64 * MEBIBYTE;

export interface MemoryPlanRequest {
  /** GPU bytes for everything. */
  readonly budgetBytes: number;
  readonly config: ModelConfig;
  readonly kv: KvGeometry;
  readonly weightBytes: number;
  readonly maxPrefillRows: number;
  readonly maxContextTokens: number;
  /** Pages are planned for all sequences at this length at once. */
  readonly tokensPerSequence: number;
  readonly activations: ActivationType;
  readonly device: BufferLimits;
  readonly profile: DeviceProfile;
  /** Most sequences wanted. Default 4096. */
  readonly maxSequences?: number;
  /** Default 16. */
  readonly maxDecodeSteps?: number;
  /** Bytes of the budget that are left alone. Default 512 MiB. */
  readonly reservedBytes?: number;
}

/** What keeps a plan from more sequences. */
export type MemoryPlanLimit = "memory" | "pages of one binding" | "residual of one binding" | "maxSequences";

export interface PlannedMemory {
  readonly weights: number;
  readonly kvPages: number;
  readonly kvResidual: number;
  readonly activations: number;
  /** Tables, staging for the host, partial sums. */
  readonly other: number;
  readonly total: number;
}

export interface MemoryPlan {
  readonly maxSequences: number;
  readonly numPages: number;
  /** Of the pages. */
  readonly kvBytes: number;
  readonly kvCapacityTokens: number;
  readonly bytes: PlannedMemory;
  readonly limitedBy: MemoryPlanLimit;
}

/** Bytes of a model's tensors as its file has them; on the GPU they are repacked to about the same. */
export function modelWeightBytes(model: LoadedModel): number {
  let bytes = 0;
  for (const tensor of model.tensors.values()) bytes += tensor.bytes;
  return bytes;
}

/** f16 K and V of one sequence's newest tokens, in one layer. */
function residualLayerBytes({ residualTokens, kvHeads, headDim }: KvGeometry): number {
  return 2 * residualTokens * kvHeads * headDim * 2;
}

function fixedBytes(request: MemoryPlanRequest, sequences: number): Omit<PlannedMemory, "kvPages" | "total"> {
  const { config, kv, maxPrefillRows, maxContextTokens, maxDecodeSteps = 16, activations: type } = request;
  const shape = { type, maxPrefillRows, maxSequences: sequences, fusedGate: type === "f16" };
  const logits = logitsRows(request.device, request.profile, config.vocabulary, sequences) * config.vocabulary * 4;
  const chunk = maxPrefillRows * 2 * kv.kvHeads * kv.headDim * 2;
  const pagesPerSequence = Math.ceil(maxContextTokens / kv.blockTokens);
  const results = sequences * maxDecodeSteps * SAMPLE_RESULT_BYTES;
  const head = sequences * (4 + SAMPLE_PARAMETER_BYTES + SAMPLE_RESULT_BYTES);
  const slots = sequences * (2 * FEEDBACK_ROW_WORDS + 3 + pagesPerSequence) * 4;
  const rope = maxContextTokens * config.rope.dimensions * 4;
  return {
    weights: request.weightBytes,
    kvResidual: sequences * kv.layers * residualLayerBytes(kv),
    activations: activationBytes(config, shape) + logits + chunk,
    // The log on the GPU, and three copies for the host; both phases have tables of their own.
    other: 4 * results + 2 * head + slots + rope + kv.blockBytes + PARTIALS_BYTES,
  };
}

function pagesOf(request: MemoryPlanRequest, sequences: number): number {
  const { residualTokens, blockTokens } = request.kv;
  const windows = Math.floor(request.tokensPerSequence / residualTokens);
  // At least the window that a lone sequence has to seal.
  return Math.max(sequences * windows, 1) * (residualTokens / blockTokens);
}

function plannedBytes(request: MemoryPlanRequest, sequences: number, pages: number): PlannedMemory {
  const fixed = fixedBytes(request, sequences);
  const kvPages = pages * request.kv.blockBytes;
  const total = fixed.weights + kvPages + fixed.kvResidual + fixed.activations + fixed.other;
  return { ...fixed, kvPages, total };
}

/**
 * The most sequences of a length that the budget holds, and as many pages as then fit.
 * @throws ClusterError INVALID_ARGUMENT where not even one sequence fits.
 */
export function planMemory(request: MemoryPlanRequest): MemoryPlan {
  const {
    budgetBytes,
    kv,
    device,
    maxSequences = DEFAULT_MAX_SEQUENCES,
    reservedBytes = DEFAULT_RESERVED_BYTES,
  } = request;
  const available = budgetBytes - reservedBytes;
  const bound = Math.min(device.maxStorageBufferBindingSize, device.maxBufferSize);
  const boundPages = Math.floor(bound / (kv.blockBytes / kv.layers));
  const boundSlots = Math.floor(bound / residualLayerBytes(kv));
  const limitOf = (sequences: number): MemoryPlanLimit | undefined => {
    if (sequences > maxSequences) return "maxSequences";
    if (sequences > boundSlots) return "residual of one binding";
    const pages = pagesOf(request, sequences);
    if (pages > boundPages) return "pages of one binding";
    return plannedBytes(request, sequences, pages).total > available ? "memory" : undefined;
  };
  let fits = 0;
  let tooMany = maxSequences + 1;
  while (tooMany - fits > 1) {
    const middle = Math.floor((fits + tooMany) / 2);
    if (limitOf(middle) === undefined) fits = middle;
    else tooMany = middle;
  }
  const limitedBy = limitOf(tooMany) ?? "maxSequences";
  if (fits === 0) {
    const needed = plannedBytes(request, 1, pagesOf(request, 1)).total + reservedBytes;
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `${budgetBytes} bytes of GPU memory hold no sequence of ${request.tokensPerSequence} tokens: limited by ${limitedBy}, one needs ${needed} bytes`,
    );
  }
  const rest = available - plannedBytes(request, fits, 0).total;
  const numPages = Math.min(Math.floor(rest / kv.blockBytes), boundPages);
  return {
    maxSequences: fits,
    numPages,
    kvBytes: numPages * kv.blockBytes,
    kvCapacityTokens: numPages * kv.blockTokens,
    bytes: plannedBytes(request, fits, numPages),
    limitedBy,
  };
}
