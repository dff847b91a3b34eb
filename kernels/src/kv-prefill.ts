/** Prefill attention of one model: the kernel that fits the device, format and shape. */
import type { Gpu } from "./device.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { prefillAttentionWgsl } from "./kv-attention.wgsl.ts";
import type { AttentionTemplate } from "./kv-attention-template.ts";
import type { KvFormat, KvShape } from "./kv-format.ts";
import { prefillMatrixWgsl } from "./kv-prefill-matrix.wgsl.ts";
import { type PrefillMatrixPlan, type PrefillMatrixTemplate, prefillMatrixMemory } from "./kv-prefill-matrix-plan.ts";
import type { PrefillPlan } from "./kv-steps.ts";

/** `loops`: any device. `matrix`: products of f16 matrices. */
export type PrefillVariant = "loops" | "matrix";

/** Which kernel runs, and how many rows its tiles have. */
export interface PrefillChoice {
  readonly variant: PrefillVariant;
  /** Of the matrix kernel. */
  readonly plan: PrefillMatrixPlan | undefined;
  readonly tileRows: number;
}

export interface PrefillBuffers {
  readonly qkv: GPUBuffer;
  readonly pages: GPUBuffer;
  readonly chunkKv: GPUBuffer;
  readonly tiles: GPUBuffer;
  readonly pageTable: GPUBuffer;
  readonly output: GPUBuffer;
}

export interface PrefillAttention {
  bind(buffers: PrefillBuffers): { encode(pass: GPUComputePassEncoder, plan: PrefillPlan): void };
}

/** How a workgroup of the matrix kernel shares its work; 128 queries, or 64 for small heads. */
function matrixPlan(shape: KvShape, heads: number, emulated: boolean): PrefillMatrixPlan {
  const gqa = heads / shape.kvHeads;
  const queries = emulated ? "shared" : "registers";
  const common = { queries, loads: "early", order: "matrices first" } as const;
  if (emulated) return { ...common, tileRows: 16, queryHeads: 1, rowBlocks: 1, columnGroups: 1 };
  if (shape.headDim <= 64) return { ...common, tileRows: 64, queryHeads: 1, rowBlocks: 2, columnGroups: 2 };
  if (gqa % 4 === 0) return { ...common, tileRows: 32, queryHeads: 4, rowBlocks: 2, columnGroups: 2 };
  return { ...common, tileRows: 128, queryHeads: 1, rowBlocks: 2, columnGroups: 2 };
}

function matrixTemplate(gpu: Gpu, template: AttentionTemplate): PrefillMatrixTemplate {
  const { format, shape, heads, maxPages, scale, output } = template;
  const emulated = !gpu.features.subgroupMatrix;
  return {
    format,
    shape,
    heads,
    maxPages,
    scale,
    plan: matrixPlan(shape, heads, emulated),
    dialect: emulated ? "emulated" : "device",
    arithmetic: gpu.features.shaderF16 ? "f16" : "f32",
    output,
  };
}

function matrixSupports(gpu: Gpu, format: KvFormat, shape: KvShape): boolean {
  return gpu.features.subgroupMatrix && shape.headDim % 32 === 0 && shape.headDim <= (format.rotated ? 128 : 256);
}

/** @param wanted overrides the choice by the device; for tests. */
export function choosePrefill(gpu: Gpu, template: AttentionTemplate, wanted?: PrefillVariant): PrefillChoice {
  const loops = { variant: "loops", plan: undefined, tileRows: template.tileRows } as const;
  const { format, shape } = template;
  const fits = gpu.profile === "hardware" && matrixSupports(gpu, format, shape);
  if ((wanted ?? (fits ? "matrix" : "loops")) === "loops") return loops;
  const matrix = matrixTemplate(gpu, template);
  if (prefillMatrixMemory(matrix) > gpu.device.limits.maxComputeWorkgroupStorageSize) return loops;
  return { variant: "matrix", plan: matrix.plan, tileRows: matrix.plan.tileRows };
}

const BINDINGS = ["read", "read", "read", "read", "read", "read_write"] as const;

/** @throws KernelCompileError with the driver's message. */
export async function createPrefillAttention(
  gpu: Gpu,
  template: AttentionTemplate,
  choice: PrefillChoice,
): Promise<PrefillAttention> {
  const matrix = choice.plan !== undefined;
  const kernel = await cachedKernel(gpu, {
    label: `kv attention prefill ${template.format.name} ${choice.variant}`,
    code: matrix ? prefillMatrixWgsl(matrixTemplate(gpu, template)) : prefillAttentionWgsl(template),
    bindings: BINDINGS,
    immediateBytes: matrix ? 8 : 12,
  });
  const headParts = template.heads / (choice.plan?.queryHeads ?? template.queryHeads);
  return {
    bind({ qkv, pages, chunkKv, tiles, pageTable, output }) {
      const bound = kernel.bind([qkv, pages, chunkKv, tiles, pageTable, output]);
      // one, and words that only decode uses.
      const words = new Uint32Array(matrix ? [1, 0] : [1, 0, 0]);
      return { encode: (pass, plan) => bound.encode(pass, words, [plan.tiles, headParts]) };
    },
  };
}
