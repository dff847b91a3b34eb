/** Scratch buffers of a step, shared by all layers and by both phases, which run one after the other. */
import type { ModelConfig } from "../model/model-config.ts";
import type { MemoryAccount } from "./memory-account.ts";

export interface Activations {
  /** u32 [maxPrefillRows]: written from the host before the step, so each phase has its own. */
  readonly prefillTokens: GPUBuffer;
  /** u32 [maxSequences]. */
  readonly decodeTokens: GPUBuffer;
  /** Residual stream: f32 [rows][hidden]. */
  readonly hidden: GPUBuffer;
  /** f32 [rows][hidden]. */
  readonly normed: GPUBuffer;
  /** f32 [rows][(heads + 2 kvHeads) * headDim]. */
  readonly qkv: GPUBuffer;
  /** f32 [rows][heads * headDim]. */
  readonly attention: GPUBuffer;
  /** f32 [rows][2 * feedForward]. */
  readonly gateUp: GPUBuffer;
  /** f32 [rows][feedForward]. */
  readonly gated: GPUBuffer;
}

/** @throws RangeError where a buffer exceeds what the device binds. */
export function createActivations(
  memory: MemoryAccount,
  config: ModelConfig,
  maxPrefillRows: number,
  maxSequences: number,
): Activations {
  const rows = Math.max(maxPrefillRows, maxSequences);
  const floats = (label: string, width: number) => memory.storage("activations", label, rows * width * 4);
  return {
    prefillTokens: memory.storage("activations", "prefill tokens", maxPrefillRows * 4),
    decodeTokens: memory.storage("activations", "decode tokens", maxSequences * 4),
    hidden: floats("hidden", config.hidden),
    normed: floats("normed", config.hidden),
    qkv: floats("qkv", (config.heads + 2 * config.kvHeads) * config.headDim),
    attention: floats("attention output", config.heads * config.headDim),
    gateUp: floats("gate and up", 2 * config.feedForward),
    gated: floats("gated", config.feedForward),
  };
}
