/** Gated activation of the feed-forward block: silu(gate) · up. */
import type { Gpu } from "./device.ts";
import { checkRows } from "./element-grid.ts";
import type { ActivationOutput } from "./half-output.wgsl.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { siluMulThreads, siluMulWgsl } from "./silu-mul.wgsl.ts";

export interface SiluMulBuffers {
  /** f32 [rows][2 · width], gate first. */
  readonly gateUp: GPUBuffer;
  /** [rows][width] as f32 or, where so created, f16 pairs in u32. */
  readonly output: GPUBuffer;
}

export interface BoundSiluMul {
  /** @throws RangeError unless 1 ≤ rows ≤ 65535. */
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

export interface SiluMul {
  bind(buffers: SiluMulBuffers): BoundSiluMul;
}

export interface SiluMulDescriptor {
  readonly width: number;
  /** Type of what is written. f16 is clamped to ±65504; NaN stays NaN. Default: f32. */
  readonly output?: ActivationOutput;
}

/** @throws RangeError unless `width` is a positive multiple of 4. */
export async function createSiluMul(gpu: Gpu, descriptor: SiluMulDescriptor): Promise<SiluMul> {
  const { width, output: outputType = "f32" } = descriptor;
  if (!Number.isInteger(width) || width < 4 || width % 4 !== 0) {
    throw new RangeError(`silu-mul: width ${width}, must be a positive multiple of 4`);
  }
  const threads = siluMulThreads(gpu.profile);
  const kernel = await cachedKernel(gpu, {
    label: `silu-mul ${width} ${outputType}`,
    code: siluMulWgsl({ width, output: outputType, threads }),
    bindings: ["read", "read_write"],
    immediateBytes: 0,
  });
  return {
    bind({ gateUp, output }) {
      const bound = kernel.bind([gateUp, output]);
      return {
        encode(pass, rows) {
          checkRows("silu-mul", rows);
          bound.encode(pass, undefined, [Math.ceil(width / 4 / threads), rows]);
        },
      };
    },
  };
}

/** f64 reference. @param gateUp [rows][2 · width]. @returns [rows][width]. */
export function siluMulReference(gateUp: Float32Array, rows: number, width: number): Float64Array {
  const output = new Float64Array(rows * width);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < width; column++) {
      const gate = gateUp[row * 2 * width + column] as number;
      const up = gateUp[row * 2 * width + width + column] as number;
      output[row * width + column] = (gate / (1 + Math.exp(-gate))) * up;
    }
  }
  return output;
}
