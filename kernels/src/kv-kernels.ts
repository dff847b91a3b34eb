/**
 * The KV path of one model: rotary embedding and KV write, sealing, and attention over sealed pages and f16 tokens.
 *
 * One `KvKernels` serves all layers; `bindLayer` binds a layer's buffers once. A step first prepares its tables
 * (`preparePrefill`, `prepareDecode`, `prepareSeal`: a few small writes), then encodes layer after layer.
 */
import type { Gpu } from "./device.ts";
import type { KvFormat, KvShape } from "./kv-format.ts";
import type { DecodePlan, DecodeRow, PrefillChunk, PrefillPlan, SealPlan, SealWindow } from "./kv-steps.ts";

/** How a head's dimensions are paired: (2i, 2i+1) as GGUF's Llama weights are stored, or (i, i + ropeDim/2) as in HF. */
export type RopeLayout = "interleaved" | "half";

export interface KvKernelOptions {
  readonly format: KvFormat;
  readonly shape: KvShape;
  /** Query heads: a multiple of shape.kvHeads. */
  readonly heads: number;
  /** Most prefill rows in a step. */
  readonly maxRows: number;
  /** Most decode rows in a step; also the most windows sealed in one. */
  readonly maxDecodeRows: number;
  /** Running sequences: rows of the page table, windows of the residual buffers. */
  readonly maxSlots: number;
  readonly maxPagesPerSequence: number;
  readonly maxPositions: number;
  readonly ropeLayout: RopeLayout;
  /** f32 [maxPositions][ropeDim / 2][2] from `buildRopeTable`. */
  readonly ropeTable: Float32Array<ArrayBuffer>;
  /** Dimensions that turn. Default: the whole head. */
  readonly ropeDim?: number;
  /** Factor of the logits. Default: 1 / sqrt(headDim). */
  readonly attentionScale?: number;
}

/** One layer's buffers. `qkv`, `chunkKv` and `output` may be shared by all layers. */
export interface KvLayerBuffers {
  /** f32 [rows][(heads + 2 kvHeads) * headDim]: q | k | v. Its q part is overwritten with the turned q. */
  readonly qkv: GPUBuffer;
  /** u32 [numPages][pageBytes / 4]. */
  readonly pages: GPUBuffer;
  /** u32 [maxSlots][2][residualTokens][kvHeads * headDim / 2]: K and V as f16 pairs; token t at index t % residualTokens. */
  readonly residual: GPUBuffer;
  /** u32 [maxRows][2][kvHeads * headDim / 2]: K and V of the prefill rows as f16 pairs. */
  readonly chunkKv: GPUBuffer;
  /** f32 [rows][heads * headDim]. */
  readonly output: GPUBuffer;
}

export interface KvLayer {
  /** Rope and KV write, sealing of the windows that the chunks complete, attention. */
  encodePrefill(pass: GPUComputePassEncoder, plan: PrefillPlan): void;
  /** Rope and KV write into the residual, attention. */
  encodeDecode(pass: GPUComputePassEncoder, plan: DecodePlan): void;
  /** Seals full residual windows into their pages; after all layers of the step that filled them. */
  encodeSeal(pass: GPUComputePassEncoder, plan: SealPlan): void;
}

/** Bits of a slot's word in `KvKernels.status`. */
export const KV_STATUS_KEY_NOT_FINITE = 1;
export const KV_STATUS_VALUE_NOT_FINITE = 2;

export interface KvKernels {
  readonly format: KvFormat;
  readonly shape: KvShape;
  /** u32 [maxSlots][maxPagesPerSequence]: page of block i of the sequence in a slot. Written by `setPages`. */
  readonly pageTable: GPUBuffer;
  /** u32 [maxSlots]: KV_STATUS_* bits; nonzero means that K or V was NaN or beyond f16, and the sequence must fail. */
  readonly status: GPUBuffer;
  /** Bytes that `residual` of one layer needs. */
  readonly residualBytes: number;
  /** Bytes that `chunkKv` needs. */
  readonly chunkKvBytes: number;
  /** Enters pages of blocks firstBlock... of a slot; takes effect for steps submitted later. */
  setPages(slot: number, firstBlock: number, pages: ArrayLike<number>): void;
  /** Zeroes a slot's status word, when a sequence takes the slot. */
  clearStatus(slot: number): void;
  /**
   * Uploads the tables of a prefill phase; submit its pass before preparing the next one.
   * @throws RangeError for a chunk that is not at a window's start or exceeds a limit.
   */
  preparePrefill(chunks: readonly PrefillChunk[]): PrefillPlan;
  prepareDecode(rows: readonly DecodeRow[]): DecodePlan;
  prepareSeal(windows: readonly SealWindow[]): SealPlan;
  bindLayer(buffers: KvLayerBuffers): KvLayer;
  /** Destroys the buffers made here; not those passed to bindLayer. */
  destroy(): void;
}

/** Compiles the kernels. @throws RangeError for shapes that do not fit together, KernelCompileError from the driver. */
export async function createKvKernels(gpu: Gpu, options: KvKernelOptions): Promise<KvKernels> {
  throw new RangeError(`not built yet: ${gpu.name} ${options.format.name}`);
}
