/**
 * Linear layer: output[r][n] = Σ_k input[r][k] · weight[n][k], f32 accumulation.
 *
 * What a row gets depends on that row, N and K alone: never on the other rows of the dispatch nor on its place.
 */
import type { ActivationType } from "./activation-type.ts";
import type { Gpu } from "./device.ts";
import type { Kernel } from "./kernel.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { columnsSteps } from "./linear-columns.wgsl.ts";
import { linearMatrixVariants } from "./linear-matrix-variant.ts";
import { LINEAR_IMMEDIATE_BYTES } from "./linear-parameters.wgsl.ts";
import { type LinearVariant, type LinearVariants, linearVariants } from "./linear-variant.ts";
import type { LinearWeight } from "./linear-weight.ts";

export interface LinearDescriptor {
  readonly weight: LinearWeight;
  /** Rows of a phase always take that phase's kernel. */
  readonly phase: "prefill" | "decode";
  /** Most rows of one `encode`. */
  readonly maxRows: number;
  /** output += result, instead of output = result. Not with an epilogue. */
  readonly accumulate: boolean;
  /**
   * `f32` (default): input `array<vec4f>`, [rows][K]. `f16`: matrix kernels; input `array<vec4<u32>>`, [rows][K] halves,
   * K a multiple of 32. See `activationType`.
   */
  readonly input?: ActivationType;
  /**
   * `silu-mul` (f16 input only): the weight is gate and up stacked, [2F][K]; the output is f16 [rows][F],
   * silu(gate) · up clamped to ±65504, F a multiple of 8.
   */
  readonly epilogue?: LinearEpilogue;
  /** `invariant` (default): a row's bits depend on that row, N and K alone. `fast`: also on the number of rows. */
  readonly numerics?: LinearNumerics;
  /** How matrix kernels are written; default `device`. `emulated` runs on any driver, slowly: for tests. */
  readonly dialect?: "device" | "emulated";
}

export type LinearEpilogue = "none" | "silu-mul";
export type LinearNumerics = "invariant" | "fast";

export interface LinearBuffers {
  /** [rows][K], f32 or halves as the descriptor's `input` says. */
  readonly input: GPUBuffer;
  /** f32 [rows][outputStride]; with epilogue `silu-mul` f16 [rows][F] without stride or offset. */
  readonly output: GPUBuffer;
  /** Elements from one output row to the next; default N. */
  readonly outputStride?: number;
  /** Elements before the first output of a row; default 0. */
  readonly outputOffset?: number;
}

export interface BoundLinear {
  /** @throws RangeError unless 1 ≤ rows ≤ maxRows. */
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

export interface Linear {
  bind(buffers: LinearBuffers): BoundLinear;
}

interface CompiledVariant {
  readonly variant: LinearVariant;
  readonly kernel: Kernel;
}

/**
 * Compiles (or reuses) the kernels of one linear layer.
 * @throws RangeError for `maxRows` outside 1 … 65535 or a weight laid out for another profile.
 */
export async function createLinear(gpu: Gpu, descriptor: LinearDescriptor): Promise<Linear> {
  const { weight, maxRows } = descriptor;
  if (!Number.isInteger(maxRows) || maxRows < 1 || maxRows > 65535) {
    throw new RangeError(`${weight.label}: maxRows ${maxRows}, must be 1 … 65535`);
  }
  const plan = pickVariants(gpu, descriptor);
  const compiled = await Promise.all(
    plan.variants.map(async (variant): Promise<CompiledVariant> => {
      const kernel = await cachedKernel(gpu, {
        label: variant.label,
        code: variant.code,
        bindings: ["read", "read", "read", "read_write"],
        immediateBytes: LINEAR_IMMEDIATE_BYTES,
      });
      return { variant, kernel };
    }),
  );
  return { bind: (buffers) => bindLinear(descriptor, plan, compiled, buffers) };
}

function pickVariants(gpu: Gpu, descriptor: LinearDescriptor): LinearVariants {
  const { weight, phase, maxRows, input = "f32", epilogue = "none" } = descriptor;
  if (input === "f16") return linearMatrixVariants(gpu, descriptor);
  if (epilogue !== "none") throw new RangeError(`${weight.label}: epilogue ${epilogue} needs f16 inputs`);
  return linearVariants(gpu, weight, phase, maxRows);
}

function checkOutput({ weight, input, epilogue }: LinearDescriptor, stride: number, offset: number): void {
  if (offset < 0 || offset + weight.rows > stride) {
    throw new RangeError(`${weight.label}: outputs ${offset} … ${offset + weight.rows} do not fit a row of ${stride}`);
  }
  if (input !== "f16") return;
  if (epilogue === "silu-mul" && (stride !== weight.rows || offset !== 0)) {
    throw new RangeError(`${weight.label}: gated outputs have no stride or offset of their own`);
  }
  if (stride % 4 !== 0 || offset % 4 !== 0) {
    throw new RangeError(`${weight.label}: stride ${stride} and offset ${offset} must be multiples of 4`);
  }
}

function bindLinear(
  descriptor: LinearDescriptor,
  plan: LinearVariants,
  compiled: readonly CompiledVariant[],
  buffers: LinearBuffers,
): BoundLinear {
  const { weight, maxRows, accumulate } = descriptor;
  const { outputStride = weight.rows, outputOffset = 0 } = buffers;
  checkOutput(descriptor, outputStride, outputOffset);
  const bound = compiled.map(({ variant, kernel }) => ({
    variant,
    kernel: kernel.bind([buffers.input, weight.codes, weight.scales, buffers.output]),
  }));
  const immediates = new Uint32Array(LINEAR_IMMEDIATE_BYTES / 4);
  immediates.set([
    0,
    weight.rows,
    weight.columns,
    outputStride,
    outputOffset,
    columnsSteps(weight.encoding),
    accumulate ? 1 : 0,
  ]);
  return {
    encode(pass, rows) {
      if (!Number.isInteger(rows) || rows < 1 || rows > maxRows) {
        throw new RangeError(`${weight.label}: ${rows} rows, must be 1 … ${maxRows}`);
      }
      immediates[0] = rows;
      const chosen = bound[plan.choose(rows)];
      if (chosen === undefined) throw new Error(`${weight.label}: no kernel variant`);
      chosen.kernel.encode(pass, immediates, chosen.variant.grid(rows));
    },
  };
}
