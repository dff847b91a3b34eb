/** Prefill attention of one model: the kernel that fits the device, format and shape. */
import type { Gpu } from "./device.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { prefillAttentionWgsl } from "./kv-attention.wgsl.ts";
import type { AttentionTemplate } from "./kv-attention-template.ts";
import { prefillMatrixWgsl } from "./kv-prefill-matrix.wgsl.ts";
import { type PrefillMatrixTemplate, planPrefillMatrix, prefillMatrixMemory } from "./kv-prefill-matrix-plan.ts";
import type { PrefillPlan } from "./kv-steps.ts";

/** `loops`: any device. `matrix`: products of f16 matrices. */
export type PrefillVariant = "loops" | "matrix";

/** Which kernel runs, and how many rows its tiles have. */
export interface PrefillChoice {
  readonly variant: PrefillVariant;
  readonly matrix: PrefillMatrixTemplate | undefined;
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

/** Of the matrix kernel; undefined where it does not fit the shape or the device's workgroup memory. */
function matrixTemplate(gpu: Gpu, template: AttentionTemplate): PrefillMatrixTemplate | undefined {
  const { format, shape, heads, maxPages, scale, output } = template;
  const dialect = gpu.features.subgroupMatrix ? "device" : "emulated";
  const arithmetic = gpu.features.shaderF16 ? "f16" : "f32";
  const plan = planPrefillMatrix(shape, heads, dialect);
  if (plan === undefined) return undefined;
  const matrix = { format, shape, heads, maxPages, scale, plan, dialect, arithmetic, output } as const;
  return prefillMatrixMemory(matrix) <= gpu.device.limits.maxComputeWorkgroupStorageSize ? matrix : undefined;
}

/**
 * @param wanted overrides the choice by the device; for tests.
 * @throws RangeError where matrices are wanted and do not fit.
 */
export function choosePrefill(gpu: Gpu, template: AttentionTemplate, wanted?: PrefillVariant): PrefillChoice {
  const device = gpu.profile === "hardware" && gpu.features.subgroupMatrix ? "matrix" : "loops";
  const matrix = (wanted ?? device) === "matrix" ? matrixTemplate(gpu, template) : undefined;
  if (matrix !== undefined) return { variant: "matrix", matrix, tileRows: matrix.plan.tileRows };
  if (wanted === "matrix") throw new RangeError(`no matrices for heads of ${template.shape.headDim}`);
  return { variant: "loops", matrix, tileRows: template.tileRows };
}

const BINDINGS = ["read", "read", "read", "read", "read", "read_write"] as const;

/** @throws KernelCompileError with the driver's message. */
export async function createPrefillAttention(
  gpu: Gpu,
  template: AttentionTemplate,
  choice: PrefillChoice,
): Promise<PrefillAttention> {
  const { matrix, variant } = choice;
  const kernel = await cachedKernel(gpu, {
    label: `kv attention prefill ${template.format.name} ${variant}`,
    code: matrix ? prefillMatrixWgsl(matrix) : prefillAttentionWgsl(template),
    bindings: BINDINGS,
    immediateBytes: matrix ? 8 : 12,
  });
  const headParts = template.heads / (matrix?.plan.queryHeads ?? template.queryHeads);
  return {
    bind({ qkv, pages, chunkKv, tiles, pageTable, output }) {
      const bound = kernel.bind([qkv, pages, chunkKv, tiles, pageTable, output]);
      // one, and words that only decode uses.
      const words = new Uint32Array(matrix ? [1, 0] : [1, 0, 0]);
      return { encode: (pass, plan) => bound.encode(pass, words, [plan.tiles, headParts]) };
    },
  };
}
