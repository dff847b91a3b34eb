/** A linear layer over stacked weights: one dispatch where they are one matrix, else one a part. */
import { createLinear, type Gpu, type LinearDescriptor } from "@kivimesh/kernels";
import type { StackedWeight } from "./model-weights.ts";

export type Phase = "prefill" | "decode";

/** What all linear layers of a runner have in common; see LinearDescriptor. */
export interface LinearSettings {
  readonly input: NonNullable<LinearDescriptor["input"]>;
  readonly numerics: NonNullable<LinearDescriptor["numerics"]>;
  readonly dialect: NonNullable<LinearDescriptor["dialect"]>;
}

export interface StackedLinearDescriptor {
  readonly weight: StackedWeight;
  readonly settings: LinearSettings;
  readonly phase: Phase;
  readonly maxRows: number;
  /** output += result. Default: output = result. */
  readonly accumulate?: boolean;
  /** With one part only; see LinearDescriptor. */
  readonly epilogue?: LinearDescriptor["epilogue"];
  /** [rows][inputs], of the settings' type. */
  readonly input: GPUBuffer;
  /** f32 [rows][weight.rows]; f16 [rows][weight.rows / 2] with epilogue silu-mul. */
  readonly output: GPUBuffer;
}

export interface BoundStackedLinear {
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

export async function bindStackedLinear(gpu: Gpu, descriptor: StackedLinearDescriptor): Promise<BoundStackedLinear> {
  const { weight: stacked, settings, phase, maxRows, accumulate = false, epilogue, input, output } = descriptor;
  const bound = await Promise.all(
    stacked.parts.map(async ({ weight, outputOffset }) => {
      const common = { ...settings, weight, phase, maxRows, accumulate };
      const linear = await createLinear(gpu, epilogue === undefined ? common : { ...common, epilogue });
      if (epilogue === "silu-mul") return linear.bind({ input, output });
      return linear.bind({ input, output, outputStride: stacked.rows, outputOffset });
    }),
  );
  return {
    encode(pass, rows) {
      for (const part of bound) part.encode(pass, rows);
    },
  };
}
