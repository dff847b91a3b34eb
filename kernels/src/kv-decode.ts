/**
 * Decode attention of one model: the kernels that fit the device, format and shape, and how a step's rows are cut into
 * splits. Where there are subgroups of 32 (or a variant is asked for) a step is two dispatches, split and merge; else
 * the kernels of kv-attention.wgsl.ts, after one that writes K and V.
 */
import { createStorage } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import type { Kernel } from "./kernel.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { mergeAttentionWgsl, splitAttentionWgsl } from "./kv-attention.wgsl.ts";
import { type AttentionTemplate, SPLIT_TOKENS } from "./kv-attention-template.ts";
import { decodeHalfSupports, decodeHalfWgsl } from "./kv-decode-half.wgsl.ts";
import { DECODE_MERGE_IMMEDIATES, decodeMergeSupports, decodeMergeWgsl } from "./kv-decode-merge.wgsl.ts";
import { decodePackedWgsl } from "./kv-decode-packed.wgsl.ts";
import { decodePackedSupports } from "./kv-decode-packed-plan.ts";
import { DECODE_SPLIT_IMMEDIATES, queryTiles } from "./kv-decode-split.ts";
import type { KvKernelOptions } from "./kv-kernels.ts";
import type { DecodePlan } from "./kv-steps.ts";
import { kvWriteWgsl, WRITE_THREADS } from "./kv-write.wgsl.ts";

/**
 * `loops`: any device. `packed`: codes as pairs of f16, needs shader-f16. `half`: f16 pages.
 */
export type DecodeVariant = "loops" | "packed" | "half";

/** Buffers that decode attention shares with the rest of the KV kernels. */
export interface DecodeTables {
  readonly decodeRows: GPUBuffer;
  readonly pageTable: GPUBuffer;
  readonly ropeTable: GPUBuffer;
  readonly status: GPUBuffer;
}

export interface DecodeLayerBuffers {
  readonly qkv: GPUBuffer;
  readonly pages: GPUBuffer;
  readonly residual: GPUBuffer;
  readonly output: GPUBuffer;
}

export interface DecodeAttention {
  readonly variant: DecodeVariant;
  /** Scratch: partials of the splits of a round of rows. */
  readonly partials: GPUBuffer;
  bind(buffers: DecodeLayerBuffers): BoundDecodeAttention;
  destroy(): void;
}

export interface BoundDecodeAttention {
  /** Rope, KV write into the residual and attention of the plan's rows. */
  encode(pass: GPUComputePassEncoder, plan: DecodePlan): void;
}

/** Most bytes of split partials; longer batches are encoded in several rounds. */
const PARTIALS_LIMIT = 64 << 20;

/** Sealed tokens of a split where a row's bits must not depend on the rest of the batch: it follows from the model alone. */
const invariantSplit = (headDim: number) => (headDim > 64 ? 512 : 256);

/** Sealed tokens of a split at least, where splits follow the batch. */
const SHORTEST_SPLIT = 128;

/** Workgroups of a dispatch above which more splits do not pay. */
const ENOUGH_WORKGROUPS = 8192;

/** Query heads of a workgroup of the merge at most: their states lie in workgroup memory, which limits workgroups at a time. */
const MERGE_QUERIES = 2;

/** Query heads of a workgroup of the split at most: more share unpacked codes, but their sums take registers. */
const splitQueries = (headDim: number) => (headDim > 64 ? 2 : 4);

/** How the sealed tokens of a step's rows are shared out. */
export interface SplitPlan {
  /** Tokens of a split; a multiple of 32. */
  readonly splitTokens: number;
  /** Splits of the longest row. */
  readonly splits: number;
}

/** @param groups workgroups that share a split's tokens: rows × KV heads × tiles of queries. */
export function planSplits(numerics: "invariant" | "fast", headDim: number, groups: number, sealed: number): SplitPlan {
  if (numerics === "fast") {
    const wanted = Math.max(1, Math.ceil(ENOUGH_WORKGROUPS / groups));
    const splitTokens = Math.ceil(Math.max(sealed / wanted, SHORTEST_SPLIT) / 128) * 128;
    return { splitTokens, splits: Math.max(1, Math.ceil(sealed / splitTokens)) };
  }
  const splitTokens = invariantSplit(headDim);
  return { splitTokens, splits: Math.max(1, Math.ceil(sealed / splitTokens)) };
}

/** Whether a workgroup of 32 threads is one subgroup. */
export function hasSubgroupsOf32(gpu: Gpu): boolean {
  const info = gpu.device.adapterInfo as GPUAdapterInfo & { subgroupMinSize?: number; subgroupMaxSize?: number };
  return gpu.features.subgroups && info.subgroupMinSize === 32 && info.subgroupMaxSize === 32;
}

/** The variant for a device, format and shape. */
export function decodeVariant(gpu: Gpu, options: Pick<KvKernelOptions, "format" | "shape">): DecodeVariant {
  const { format, shape } = options;
  if (gpu.profile !== "hardware" || !hasSubgroupsOf32(gpu) || !decodeMergeSupports(shape)) return "loops";
  if (decodeHalfSupports(format, shape)) return "half";
  return gpu.features.shaderF16 && decodePackedSupports(format, shape) ? "packed" : "loops";
}

interface Common {
  readonly gpu: Gpu;
  readonly options: KvKernelOptions;
  readonly tables: DecodeTables;
  readonly scale: number;
}

const BINDINGS = (access: string) =>
  Array.from(access, (letter) => (letter === "w" ? ("read_write" as const) : ("read" as const)));

const partialBytes = ({ heads, shape }: KvKernelOptions) => heads * (shape.headDim + 2) * 4;

/** Buffer of partials for `splits` splits of every row, at most PARTIALS_LIMIT, at least one row. */
function createPartials({ gpu, options }: Common, splits: number): GPUBuffer {
  const row = partialBytes(options) * splits;
  const rows = Math.max(1, Math.min(options.maxDecodeRows, Math.floor(PARTIALS_LIMIT / row)));
  return createStorage(gpu, "kv split partials", rows * row);
}

/** @throws RangeError where `options.decodeVariant` is given and cannot hold the format. KernelCompileError. */
export async function createDecodeAttention(
  gpu: Gpu,
  options: KvKernelOptions,
  template: AttentionTemplate,
  tables: DecodeTables,
): Promise<DecodeAttention> {
  const variant = options.decodeVariant ?? decodeVariant(gpu, options);
  const common = { gpu, options, tables, scale: template.scale };
  if (variant === "loops") return createLoops(common, template);
  return createFused(common, variant);
}

async function createFused(common: Common, variant: "packed" | "half"): Promise<DecodeAttention> {
  const { gpu, options, tables, scale } = common;
  const { format, shape, heads, maxPagesPerSequence: maxPages, ropeLayout, ropeDim = shape.headDim } = options;
  const { numerics = "invariant", outputType = "f32", codeForm = "subnormal", maxPositions } = options;
  const gqa = heads / shape.kvHeads;
  const exchange = hasSubgroupsOf32(gpu) ? "subgroup" : "memory";
  const rope = { ropeDim, ropeLayout };
  const split = queryTiles(gqa, splitQueries(shape.headDim));
  const merge = queryTiles(gqa, MERGE_QUERIES);
  const base = { ...rope, shape, heads, scale, exchange } as const;
  if (!(variant === "half" ? decodeHalfSupports : decodePackedSupports)(format, shape)) {
    throw new RangeError(`decode variant ${variant} cannot hold ${format.name} with heads of ${shape.headDim}`);
  }
  const splitCode =
    variant === "half"
      ? decodeHalfWgsl({ ...base, format, maxPages, queries: split.queries })
      : decodePackedWgsl({
          ...base,
          format,
          maxPages,
          queries: split.queries,
          form: codeForm,
          unrolled: options.unrolledDecode ?? false,
        });
  const mergeCode = decodeMergeWgsl({ ...base, rotated: format.rotated, queries: merge.queries, output: outputType });
  const label = `kv decode ${format.name} ${variant}`;
  const [splitKernel, mergeKernel] = await Promise.all([
    cachedKernel(gpu, {
      label: `${label} split`,
      code: splitCode,
      bindings: BINDINGS("rrrrwr"),
      immediateBytes: DECODE_SPLIT_IMMEDIATES * 4,
    }),
    cachedKernel(gpu, {
      label: `${label} merge`,
      code: mergeCode,
      bindings: BINDINGS("rwrrwrw"),
      immediateBytes: DECODE_MERGE_IMMEDIATES * 4,
    }),
  ]);
  const shortest = numerics === "fast" ? SHORTEST_SPLIT : invariantSplit(shape.headDim);
  const partials = createPartials(common, Math.ceil(maxPositions / shortest));
  const capacity = Math.floor(partials.size / partialBytes(options));
  return {
    variant,
    partials,
    destroy: () => partials.destroy(),
    bind({ qkv, pages, residual, output }) {
      const { decodeRows, pageTable, ropeTable, status } = tables;
      const boundSplit = splitKernel.bind([qkv, pages, decodeRows, pageTable, partials, ropeTable]);
      const boundMerge = mergeKernel.bind([qkv, residual, decodeRows, partials, output, ropeTable, status]);
      const splitWords = new Uint32Array(DECODE_SPLIT_IMMEDIATES);
      const mergeWords = new Uint32Array(DECODE_MERGE_IMMEDIATES);
      return {
        encode(pass, plan) {
          const groups = plan.rows * shape.kvHeads * split.tiles;
          const { splitTokens, splits } = planSplits(numerics, shape.headDim, groups, plan.sealed);
          const perRound = Math.max(1, Math.floor(capacity / splits));
          for (let first = 0; first < plan.rows; first += perRound) {
            const rows = Math.min(perRound, plan.rows - first);
            if (plan.sealed > 0) {
              splitWords.set([1, first, plan.step, splitTokens, splits, 1]);
              boundSplit.encode(pass, splitWords, [splits, shape.kvHeads * split.tiles, rows]);
            }
            mergeWords.set([1, first, plan.step, splitTokens, splits]);
            boundMerge.encode(pass, mergeWords, [shape.kvHeads * merge.tiles, rows]);
          }
        },
      };
    },
  };
}

interface LoopKernels {
  readonly write: Kernel;
  readonly split: Kernel;
  readonly merge: Kernel;
}

async function compileLoops({ gpu, options }: Common, template: AttentionTemplate): Promise<LoopKernels> {
  const { format, shape, heads, ropeLayout, ropeDim = shape.headDim } = options;
  const compile = (label: string, code: string, access: string, words: number) =>
    cachedKernel(gpu, {
      label: `kv ${label} ${format.name}`,
      code,
      bindings: BINDINGS(access),
      immediateBytes: words * 4,
    });
  const [write, split, merge] = await Promise.all([
    compile("write decode", kvWriteWgsl({ shape, heads, ropeDim, ropeLayout, phase: "decode" }), "wrrww", 2),
    compile("attention split", splitAttentionWgsl(template), "rrrrw", 3),
    compile("attention merge", mergeAttentionWgsl(template), "rrrrw", 3),
  ]);
  return { write, split, merge };
}

async function createLoops(common: Common, template: AttentionTemplate): Promise<DecodeAttention> {
  const { options, tables } = common;
  const kernels = await compileLoops(common, template);
  const { shape, heads } = options;
  const partials = createPartials(common, template.maxSplits);
  const partialRows = Math.floor(partials.size / (partialBytes(options) * template.maxSplits));
  const writeGrid = Math.ceil(((heads + 2 * shape.kvHeads) * shape.headDim) / 4 / WRITE_THREADS);
  const headParts = heads / template.queryHeads;
  return {
    variant: "loops",
    partials,
    destroy: () => partials.destroy(),
    bind({ qkv, pages, residual, output }) {
      const { decodeRows, pageTable, ropeTable, status } = tables;
      const write = kernels.write.bind([qkv, ropeTable, decodeRows, residual, status]);
      const split = kernels.split.bind([qkv, pages, decodeRows, pageTable, partials]);
      const merge = kernels.merge.bind([qkv, residual, decodeRows, partials, output]);
      // Immediates: first row and step of the write; `one`, first row of a round and step of the others.
      const writeWords = new Uint32Array(2);
      const words = new Uint32Array([1, 0, 0]);
      return {
        encode(pass, plan) {
          writeWords[1] = plan.step;
          words[2] = plan.step;
          write.encode(pass, writeWords, [writeGrid, plan.rows]);
          const splits = Math.ceil(plan.sealed / SPLIT_TOKENS);
          for (let row = 0; row < plan.rows; row += partialRows) {
            const rows = Math.min(partialRows, plan.rows - row);
            words[1] = row;
            if (splits > 0) split.encode(pass, words, [splits, headParts, rows]);
            merge.encode(pass, words, [1, headParts, rows]);
          }
        },
      };
    },
  };
}
