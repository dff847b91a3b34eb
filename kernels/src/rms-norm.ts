/** Root-mean-square normalization: output = input / sqrt(mean(input²) + epsilon) · weight, row by row. */
import type { Gpu } from "./device.ts";
import { checkRows } from "./element-grid.ts";
import type { ActivationOutput } from "./half-output.wgsl.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { type RmsNormTemplate, rmsNormWgsl } from "./rms-norm.wgsl.ts";

export interface RmsNormBuffers {
  /** f32 [·][hidden]. */
  readonly input: GPUBuffer;
  /** f32 [hidden]. */
  readonly weight: GPUBuffer;
  /** [rows][hidden] as f32 or, where so created, f16 pairs in u32; another buffer than `input`. */
  readonly output: GPUBuffer;
  /** u32 [rows]: output row r is made from input row `rowIndices[r]`. Default: from row r. */
  readonly rowIndices?: GPUBuffer;
}

export interface BoundRmsNorm {
  /** @throws RangeError unless 1 ≤ rows ≤ 65535. */
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

export interface RmsNorm {
  bind(buffers: RmsNormBuffers): BoundRmsNorm;
}

export interface RmsNormDescriptor {
  readonly hidden: number;
  readonly epsilon: number;
  /** Type of what is written. f16 is clamped to ±65504; NaN stays NaN. Default: f32. */
  readonly output?: ActivationOutput;
  /** Overrides the choice by the device; for tests. */
  readonly variant?: RmsNormTemplate["variant"];
}

/** @throws RangeError unless `hidden` is a positive multiple of 4 and `epsilon` is positive. */
export async function createRmsNorm(gpu: Gpu, descriptor: RmsNormDescriptor): Promise<RmsNorm> {
  const { hidden, epsilon, output: outputType = "f32" } = descriptor;
  if (!Number.isInteger(hidden) || hidden < 4 || hidden % 4 !== 0) {
    throw new RangeError(`rms-norm: hidden ${hidden}, must be a positive multiple of 4`);
  }
  if (!(epsilon > 0 && Number.isFinite(epsilon)))
    throw new RangeError(`rms-norm: epsilon ${epsilon}, must be positive`);
  const label = `rms-norm ${hidden} ${outputType}`;
  const variant = descriptor.variant ?? (gpu.profile === "hardware" && gpu.features.subgroups ? "registers" : "loops");
  const template = { hidden, epsilon, output: outputType, variant };
  const [direct, gathered] = await Promise.all([
    cachedKernel(gpu, {
      label,
      code: rmsNormWgsl({ ...template, gathered: false }),
      bindings: ["read", "read", "read_write"],
    }),
    cachedKernel(gpu, {
      label: `${label} gathered`,
      code: rmsNormWgsl({ ...template, gathered: true }),
      bindings: ["read", "read", "read_write", "read"],
    }),
  ]);
  return {
    bind({ input, weight, output, rowIndices }) {
      const bound =
        rowIndices === undefined
          ? direct.bind([input, weight, output])
          : gathered.bind([input, weight, output, rowIndices]);
      return {
        encode(pass, rows) {
          checkRows("rms-norm", rows);
          bound.encode(pass, undefined, [rows]);
        },
      };
    },
  };
}

/** f64 reference. @param input [·][hidden]. @param rows which input rows, in output order. @returns [rows.length][hidden]. */
export function rmsNormReference(
  input: Float32Array,
  weight: Float32Array,
  rows: readonly number[],
  epsilon: number,
): Float64Array {
  const hidden = weight.length;
  const output = new Float64Array(rows.length * hidden);
  for (const [index, row] of rows.entries()) {
    let squares = 0;
    for (let column = 0; column < hidden; column++) squares += (input[row * hidden + column] as number) ** 2;
    const scale = 1 / Math.sqrt(squares / hidden + epsilon);
    for (let column = 0; column < hidden; column++) {
      output[index * hidden + column] = (input[row * hidden + column] as number) * scale * (weight[column] as number);
    }
  }
  return output;
}
