/** A linear layer over stacked weights: one dispatch where they are one matrix, else one a part. */
import { createLinear, type Gpu } from "@kivimesh/kernels";
import type { StackedWeight } from "./model-weights.ts";

export type Phase = "prefill" | "decode";

export interface StackedLinearDescriptor {
  readonly weight: StackedWeight;
  readonly phase: Phase;
  readonly maxRows: number;
  /** output += result. */
  readonly accumulate: boolean;
  /** f32 [rows][inputs]. */
  readonly input: GPUBuffer;
  /** f32 [rows][weight.rows]. */
  readonly output: GPUBuffer;
}

export interface BoundStackedLinear {
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

export async function bindStackedLinear(gpu: Gpu, descriptor: StackedLinearDescriptor): Promise<BoundStackedLinear> {
  const { weight: stacked, phase, maxRows, accumulate, input, output } = descriptor;
  const bound = await Promise.all(
    stacked.parts.map(async ({ weight, outputOffset }) => {
      const linear = await createLinear(gpu, { weight, phase, maxRows, accumulate });
      return linear.bind({ input, output, outputStride: stacked.rows, outputOffset });
    }),
  );
  return {
    encode(pass, rows) {
      for (const part of bound) part.encode(pass, rows);
    },
  };
}
