/** Scratch buffers of a step, shared by all layers and by both phases, which run one after the other. */
import type { ActivationType } from "@kivimesh/kernels";
import type { ModelConfig } from "../model/model-config.ts";
import type { MemoryAccount } from "./memory-account.ts";
import type { ModelWeights } from "./model-weights.ts";

export interface Activations {
  /** Of the linear layers' inputs: `normed`, `attention` and `gated`. */
  readonly type: ActivationType;
  /** u32 [maxPrefillRows]: written from the host before the step, so each phase has its own. */
  readonly prefillTokens: GPUBuffer;
  /** u32 [maxSequences]. */
  readonly decodeTokens: GPUBuffer;
  /** Residual stream: f32 [rows][hidden]. */
  readonly hidden: GPUBuffer;
  /** [rows][hidden]. */
  readonly normed: GPUBuffer;
  /** f32 [rows][(heads + 2 kvHeads) * headDim]. */
  readonly qkv: GPUBuffer;
  /** [rows][heads * headDim]. */
  readonly attention: GPUBuffer;
  /** f32 [rows][2 * feedForward]; undefined where gate and up go straight into `gated`. */
  readonly gateUp: GPUBuffer | undefined;
  /** [rows][feedForward]. */
  readonly gated: GPUBuffer;
}

export interface ActivationShape {
  readonly type: ActivationType;
  readonly maxPrefillRows: number;
  readonly maxSequences: number;
  /** Gate, up and their product are one dispatch. */
  readonly fusedGate: boolean;
}

/** Bytes of one row of each buffer. */
function rowBytes(config: ModelConfig, { type, fusedGate }: ActivationShape) {
  const { hidden, heads, kvHeads, headDim, feedForward } = config;
  const input = type === "f16" ? 2 : 4;
  return {
    hidden: hidden * 4,
    normed: hidden * input,
    qkv: (heads + 2 * kvHeads) * headDim * 4,
    attention: heads * headDim * input,
    gateUp: fusedGate ? 0 : 2 * feedForward * 4,
    gated: feedForward * input,
  };
}

/** Whether gate and up of all layers are stacked, so that one dispatch can make their product too. */
export function gateIsFused(weights: ModelWeights): boolean {
  return weights.layers.every(({ gateUp }) => gateUp.parts.length === 1);
}

/** f32 whatever the device, where a matrix is not what the matrix kernels take. */
export function usableActivations(type: ActivationType, config: ModelConfig): ActivationType {
  const { hidden, heads, kvHeads, headDim, feedForward, vocabulary } = config;
  const inputs = [hidden, heads * headDim, feedForward];
  const outputs = [hidden, heads * headDim, kvHeads * headDim, feedForward, vocabulary];
  const fits = inputs.every((count) => count % 32 === 0) && outputs.every((count) => count % 8 === 0);
  return fits ? type : "f32";
}

/** Bytes of all buffers. */
export function activationBytes(config: ModelConfig, shape: ActivationShape): number {
  const { maxPrefillRows, maxSequences } = shape;
  const row = Object.values(rowBytes(config, shape)).reduce((sum, bytes) => sum + bytes, 0);
  return Math.max(maxPrefillRows, maxSequences) * row + (maxPrefillRows + maxSequences) * 4;
}

/** @throws RangeError where a buffer exceeds what the device binds. */
export function createActivations(memory: MemoryAccount, config: ModelConfig, shape: ActivationShape): Activations {
  const { type, maxPrefillRows, maxSequences, fusedGate } = shape;
  const rows = Math.max(maxPrefillRows, maxSequences);
  const bytes = rowBytes(config, shape);
  const storage = (label: string, size: number) => memory.storage("activations", label, size);
  const buffers = {
    type,
    prefillTokens: storage("prefill tokens", maxPrefillRows * 4),
    decodeTokens: storage("decode tokens", maxSequences * 4),
    hidden: storage("hidden", rows * bytes.hidden),
    normed: storage("normed", rows * bytes.normed),
    qkv: storage("qkv", rows * bytes.qkv),
    attention: storage("attention output", rows * bytes.attention),
    gateUp: undefined,
    gated: storage("gated", rows * bytes.gated),
  };
  return fusedGate ? buffers : withGate(memory, config, shape, buffers);
}

/** Adds the buffer between gate and up, and their product. */
export function withGate(
  memory: MemoryAccount,
  config: ModelConfig,
  shape: Omit<ActivationShape, "fusedGate">,
  activations: Activations,
): Activations {
  const rows = Math.max(shape.maxPrefillRows, shape.maxSequences);
  const { gateUp } = rowBytes(config, { ...shape, fusedGate: false });
  return { ...activations, gateUp: memory.storage("activations", "gate and up", rows * gateUp) };
}
