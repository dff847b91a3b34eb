/**
 * The KV path of one model: rotary embedding and KV write, sealing, and attention over sealed pages and f16 tokens.
 *
 * One `KvKernels` serves all layers; `bindLayer` binds a layer's buffers once. A step first prepares its tables
 * (`preparePrefill`, `prepareDecode`, `prepareSeal`: a few small writes), then encodes layer after layer.
 */
import { createStorage, uploadStorage } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import type { ActivationOutput } from "./half-output.wgsl.ts";
import type { Kernel } from "./kernel.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { type AttentionTemplate, type LanePlan, SPLIT_TOKENS } from "./kv-attention-template.ts";
import { createDecodeAttention, type DecodeAttention, type DecodeVariant } from "./kv-decode.ts";
import type { CodeForm } from "./kv-decode-packed-plan.ts";
import { type KvFormat, type KvShape, validateKv } from "./kv-format.ts";
import {
  choosePrefill,
  createPrefillAttention,
  type PrefillAttention,
  type PrefillChoice,
  type PrefillVariant,
} from "./kv-prefill.ts";
import { createKvSeal, type KvSeal } from "./kv-seal.ts";
import {
  createKvStepTables,
  type DecodePlan,
  type DecodeRow,
  type DecodeStepPlan,
  type KvStepTables,
  type PrefillChunk,
  type PrefillPlan,
  type SealPlan,
  type SealWindow,
} from "./kv-steps.ts";
import { kvWriteWgsl, WRITE_THREADS } from "./kv-write.wgsl.ts";

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
  /** Decode steps that `prepareDecodeSteps` may prepare at once. Default: 1. */
  readonly maxDecodeSteps?: number;
  /** Type of `output`: f32, or f16 pairs in u32. Default: f32. */
  readonly outputType?: ActivationOutput;
  /** `invariant` (default): a row's bits depend on its own sequence only. `fast`: splits by the batch. */
  readonly numerics?: "invariant" | "fast";
  /** Overrides the kernels of decode attention that the device, format and shape would get; for tests. */
  readonly decodeVariant?: DecodeVariant;
  /** Overrides the kernel of prefill attention; for tests. */
  readonly prefillVariant?: PrefillVariant;
  /** The packed decode kernel's text for GPUs also on software drivers, which compile it slowly; for tests. */
  readonly unrolledDecode?: boolean;
  /** How the packed decode kernel reads codes. Default: subnormals; "offset" where a driver flushes them. */
  readonly codeForm?: CodeForm;
  /** Overrides how a workgroup makes its vectors; for tests of the variants that other devices get. */
  readonly lanePlan?: LanePlan;
}

/** One layer's buffers. `qkv`, `chunkKv` and `output` may be shared by all layers. */
export interface KvLayerBuffers {
  /** f32 [rows][(heads + 2 kvHeads) * headDim]: q | k | v. Its q part may be overwritten with the turned q. */
  readonly qkv: GPUBuffer;
  /** u32 [numPages][pageBytes / 4]. */
  readonly pages: GPUBuffer;
  /** u32 [maxSlots][2][residualTokens][kvHeads * headDim / 2]: K and V as f16 pairs; token t at index t % residualTokens. */
  readonly residual: GPUBuffer;
  /** u32 [maxRows][2][kvHeads * headDim / 2]: K and V of the prefill rows as f16 pairs. */
  readonly chunkKv: GPUBuffer;
  /** [rows][heads * headDim] of `outputType`. */
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
  readonly decodeVariant: DecodeVariant;
  readonly prefillVariant: PrefillVariant;
  /** u32 [maxSlots][maxPagesPerSequence]: page of block i of the sequence in a slot. Written by `setPages`. */
  readonly pageTable: GPUBuffer;
  /** u32 [maxSlots]: KV_STATUS_* bits; nonzero means that K or V was NaN or beyond f16, and the sequence must fail. */
  readonly status: GPUBuffer;
  /** GPU bytes of all buffers made here: tables, rope, page table, status, partials. */
  readonly bytes: number;
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
  /**
   * Uploads the tables of `steps` decode steps at once: step i is of the tokens at `position + i`. All of them may go into
   * one pass; pages of windows that any of them seals must be entered before.
   * @throws RangeError over `maxDecodeSteps` or where the last step is over `maxPositions`.
   */
  prepareDecodeSteps(rows: readonly DecodeRow[], steps: number): readonly DecodeStepPlan[];
  prepareSeal(windows: readonly SealWindow[]): SealPlan;
  bindLayer(buffers: KvLayerBuffers): KvLayer;
  /** Destroys the buffers made here; not those passed to bindLayer. */
  destroy(): void;
}

/** Most queries that a workgroup of attention takes at once: they share each unpacked code. */
const MAX_QUERIES = 7;

/** Queries of a prefill tile, rows times heads. */
const PREFILL_QUERIES = 4;

interface Shared {
  readonly options: KvKernelOptions;
  readonly tables: KvStepTables;
  readonly buffers: ReturnType<typeof createBuffers>;
  readonly kernels: Kernels;
}

interface Kernels {
  readonly prefillWrite: Kernel;
  readonly prefillSeal: KvSeal;
  readonly decodeSeal: KvSeal;
  readonly prefill: PrefillAttention;
  readonly decode: DecodeAttention;
}

function check(options: KvKernelOptions): void {
  const { format, shape, heads, maxPositions, ropeTable, ropeDim = shape.headDim } = options;
  validateKv(format, shape);
  if (!Number.isInteger(heads) || heads <= 0 || heads % shape.kvHeads !== 0) {
    throw new RangeError(`${heads} query heads are not a multiple of ${shape.kvHeads} KV heads`);
  }
  if (ropeDim % 4 !== 0 || ropeDim <= 0 || ropeDim > shape.headDim) {
    throw new RangeError(`ropeDim ${ropeDim} must be a multiple of 4, at most headDim ${shape.headDim}`);
  }
  if (ropeTable.length < maxPositions * ropeDim) {
    throw new RangeError(
      `rope table of ${ropeTable.length} values: ${maxPositions} positions need ${maxPositions * ropeDim}`,
    );
  }
  if (options.maxPagesPerSequence * shape.blockTokens < maxPositions - (maxPositions % shape.residualTokens)) {
    throw new RangeError(
      `${options.maxPagesPerSequence} pages of ${shape.blockTokens} tokens do not hold ${maxPositions} positions`,
    );
  }
}

/** Largest divisor of `count` that is at most `limit`. */
function largestDivisor(count: number, limit: number): number {
  for (let divisor = Math.min(count, limit); divisor > 1; divisor--) if (count % divisor === 0) return divisor;
  return 1;
}

/** Lanes are the subgroup where every subgroup has the same, fitting size; else threads that meet in workgroup memory. */
export function planLanes(gpu: Gpu, headDim: number): LanePlan {
  const info = gpu.device.adapterInfo as GPUAdapterInfo & { subgroupMinSize?: number; subgroupMaxSize?: number };
  const size = gpu.features.subgroupSize;
  const fixed = gpu.features.subgroups && info.subgroupMinSize === size && info.subgroupMaxSize === size;
  if (fixed && [4, 8, 16, 32].includes(size) && headDim % size === 0) return { lanes: size, subgroups: true };
  return { lanes: [32, 16, 8].find((lanes) => headDim % lanes === 0) ?? 8, subgroups: false };
}

function attentionTemplate(gpu: Gpu, options: KvKernelOptions): AttentionTemplate {
  const { format, shape, heads, maxPositions, attentionScale } = options;
  const queryHeads = largestDivisor(heads / shape.kvHeads, MAX_QUERIES);
  return {
    format,
    shape,
    heads,
    maxPages: options.maxPagesPerSequence,
    maxSplits: Math.max(1, Math.ceil(maxPositions / SPLIT_TOKENS)),
    lanePlan: options.lanePlan ?? planLanes(gpu, shape.headDim),
    queryHeads,
    tileRows: Math.max(1, Math.floor(PREFILL_QUERIES / queryHeads)),
    scale: attentionScale ?? 1 / Math.sqrt(shape.headDim),
    output: options.outputType ?? "f32",
  };
}

function createBuffers(gpu: Gpu, options: KvKernelOptions, tables: KvStepTables) {
  const table = (name: string, words: Uint32Array) => createStorage(gpu, `kv ${name}`, words.byteLength);
  const { maxSlots, maxPagesPerSequence } = options;
  return {
    ropeTable: uploadStorage(gpu, "kv rope table", options.ropeTable),
    prefillRows: table("prefill rows", tables.prefillRows),
    prefillTiles: table("prefill tiles", tables.prefillTiles),
    prefillSeals: table("prefill seals", tables.prefillSeals),
    decodeRows: table("decode rows", tables.decodeRows),
    decodeSeals: table("decode seals", tables.decodeSeals),
    pageTable: uploadStorage(gpu, "kv page table", new Uint32Array(maxSlots * maxPagesPerSequence)),
    status: uploadStorage(gpu, "kv status", new Uint32Array(maxSlots)),
  };
}

async function compileKernels(
  gpu: Gpu,
  options: KvKernelOptions,
  template: AttentionTemplate,
  choice: PrefillChoice,
  tables: ReturnType<typeof createBuffers>,
): Promise<Kernels> {
  const { format, shape, heads, maxPagesPerSequence: maxPages, ropeLayout, ropeDim = shape.headDim } = options;
  const row = (shape.kvHeads * shape.headDim) / 2;
  const compile = (label: string, code: string, access: string, immediateBytes: number) =>
    cachedKernel(gpu, {
      label: `kv ${label} ${format.name}`,
      code,
      bindings: Array.from(access, (letter) => (letter === "w" ? "read_write" : "read")),
      immediateBytes,
    });
  const write = { shape, heads, ropeDim, ropeLayout };
  const seal = { format, shape, maxPages };
  const chunkSource = { tokenStride: 2 * row, planeStride: row, slotStride: 0 };
  const residualSource = {
    tokenStride: row,
    planeStride: shape.residualTokens * row,
    slotStride: 2 * shape.residualTokens * row,
  };
  const [prefillWrite, prefillSeal, decodeSeal, prefill, decode] = await Promise.all([
    compile("write prefill", kvWriteWgsl({ ...write, phase: "prefill" }), "wrrwww", 8),
    createKvSeal(gpu, { ...seal, ...chunkSource }),
    createKvSeal(gpu, { ...seal, ...residualSource }),
    createPrefillAttention(gpu, template, choice),
    createDecodeAttention(gpu, options, template, tables),
  ]);
  return { prefillWrite, prefillSeal, decodeSeal, prefill, decode };
}

/**
 * Compiles the kernels and makes the tables.
 * @throws RangeError for shapes that do not fit together, KernelCompileError from the driver.
 */
export async function createKvKernels(gpu: Gpu, options: KvKernelOptions): Promise<KvKernels> {
  check(options);
  const { format, shape, maxRows, maxSlots, maxDecodeSteps = 1 } = options;
  const template = attentionTemplate(gpu, options);
  const choice = choosePrefill(gpu, template, options.prefillVariant);
  const tables = createKvStepTables({ ...options, maxDecodeSteps, tileRows: choice.tileRows });
  const buffers = createBuffers(gpu, options, tables);
  const kernels = await compileKernels(gpu, options, template, choice, buffers);
  const shared = { options, tables, buffers, kernels };
  const upload = (buffer: GPUBuffer, table: Uint32Array<ArrayBuffer>, entries: number) => {
    if (entries > 0) gpu.device.queue.writeBuffer(buffer, 0, table, 0, entries * 4);
  };
  const row = (shape.kvHeads * shape.headDim) / 2;
  return {
    format,
    shape,
    decodeVariant: kernels.decode.variant,
    prefillVariant: choice.variant,
    pageTable: buffers.pageTable,
    status: buffers.status,
    bytes: Object.values(buffers).reduce((sum, { size }) => sum + size, kernels.decode.partials.size),
    residualBytes: maxSlots * 2 * shape.residualTokens * row * 4,
    chunkKvBytes: Math.max(1, maxRows) * 2 * row * 4,
    setPages: (slot, firstBlock, pages) => setPages(gpu, shared, slot, firstBlock, pages),
    clearStatus: (slot) => gpu.device.queue.writeBuffer(buffers.status, slot * 4, new Uint32Array(1)),
    preparePrefill(chunks) {
      const plan = tables.fillPrefill(chunks);
      upload(buffers.prefillRows, tables.prefillRows, plan.rows);
      upload(buffers.prefillTiles, tables.prefillTiles, plan.tiles);
      upload(buffers.prefillSeals, tables.prefillSeals, plan.blocks);
      return plan;
    },
    prepareDecode(rows) {
      const [plan] = tables.fillDecodeSteps(rows, 1);
      upload(buffers.decodeRows, tables.decodeRows, rows.length);
      return (plan as DecodeStepPlan).attend;
    },
    prepareDecodeSteps(rows, steps) {
      const plans = tables.fillDecodeSteps(rows, steps);
      upload(buffers.decodeRows, tables.decodeRows, rows.length);
      const { first, blocks } = (plans.at(-1) as DecodeStepPlan).seal;
      upload(buffers.decodeSeals, tables.decodeSeals, first + blocks);
      return plans;
    },
    prepareSeal(windows) {
      const plan = tables.fillSeal(windows);
      upload(buffers.decodeSeals, tables.decodeSeals, plan.blocks);
      return plan;
    },
    bindLayer: (layer) => bindLayer(shared, layer),
    destroy() {
      kernels.decode.destroy();
      for (const buffer of Object.values(buffers)) buffer.destroy();
    },
  };
}

function setPages(gpu: Gpu, { options, buffers }: Shared, slot: number, firstBlock: number, pages: ArrayLike<number>) {
  const { maxSlots, maxPagesPerSequence: most } = options;
  if (!Number.isInteger(slot) || slot < 0 || slot >= maxSlots) {
    throw new RangeError(`slot ${slot} is not in 0..${maxSlots - 1}`);
  }
  if (!Number.isInteger(firstBlock) || firstBlock < 0 || firstBlock + pages.length > most) {
    throw new RangeError(`blocks ${firstBlock}..${firstBlock + pages.length - 1}: a sequence has at most ${most}`);
  }
  if (pages.length > 0) {
    gpu.device.queue.writeBuffer(buffers.pageTable, (slot * most + firstBlock) * 4, Uint32Array.from(pages));
  }
}

function bindLayer(shared: Shared, layer: KvLayerBuffers): KvLayer {
  const { kernels, buffers, options } = shared;
  const { qkv, pages, residual, chunkKv, output } = layer;
  const { ropeTable, prefillRows, prefillTiles, prefillSeals, decodeSeals, pageTable, status } = buffers;
  const prefillWrite = kernels.prefillWrite.bind([qkv, ropeTable, prefillRows, residual, status, chunkKv]);
  const prefillSeal = kernels.prefillSeal.bind({ source: chunkKv, seals: prefillSeals, pageTable, pages, status });
  const decodeSeal = kernels.decodeSeal.bind({ source: residual, seals: decodeSeals, pageTable, pages, status });
  const prefill = kernels.prefill.bind({ qkv, pages, chunkKv, tiles: prefillTiles, pageTable, output });
  const decode = kernels.decode.bind({ qkv, pages, residual, output });
  const { shape, heads } = options;
  const writeGrid = Math.ceil(((heads + 2 * shape.kvHeads) * shape.headDim) / 4 / WRITE_THREADS);
  // First row and step.
  const writeWords = new Uint32Array(2);
  return {
    encodePrefill(pass, plan) {
      if (plan.rows === 0) return;
      prefillWrite.encode(pass, writeWords, [writeGrid, plan.rows]);
      if (plan.blocks > 0) prefillSeal.encode(pass, plan.blocks);
      prefill.encode(pass, plan);
    },
    encodeDecode(pass, plan) {
      if (plan.rows > 0) decode.encode(pass, plan);
    },
    encodeSeal(pass, { blocks, first }) {
      if (blocks > 0) decodeSeal.encode(pass, blocks, first);
    },
  };
}
