/** RMS norm and gated activation, writing the f16 that matrix kernels read. */
import { createRmsNorm, createSiluMul, createStorage, type Gpu, halfToFloat, readBuffer } from "../../src/index.ts";
import { rmsNormReference } from "../../src/rms-norm.ts";
import { siluMulReference } from "../../src/silu-mul.ts";
import type { CaseList, KernelCase, PreparedCase } from "../kernel-case.ts";
import { fillRandom, poisonBuffer, relativeError } from "./random-fill.ts";

/** Rows that are compared: the first and the last. */
function sampledRows(rows: number): number[] {
  return rows === 1 ? [0] : [0, rows - 1];
}

interface Element {
  readonly rows: number;
  /** f32 values of an input row, halves of an output row. */
  readonly inputs: number;
  readonly outputs: number;
  readonly input: GPUBuffer;
  readonly output: GPUBuffer;
  readonly others: readonly GPUBuffer[];
  encode(pass: GPUComputePassEncoder): void;
  reference(input: Float32Array): Promise<Float64Array>;
}

function prepared(gpu: Gpu, element: Element): PreparedCase {
  const { rows, inputs, outputs, input, output, others } = element;
  return {
    encode: (pass) => element.encode(pass),
    poison: () => poisonBuffer(gpu, output),
    // Half of a unit of f16.
    tolerance: 5e-4,
    async check() {
      const errors: number[] = [];
      for (const row of sampledRows(rows)) {
        const source = new Float32Array(await readBuffer(gpu, input, row * inputs * 4, inputs * 4));
        const halves = new Uint16Array(await readBuffer(gpu, output, row * outputs * 2, outputs * 2));
        errors.push(relativeError(Float32Array.from(halves, halfToFloat), await element.reference(source)));
      }
      return Math.max(...errors);
    },
    destroy() {
      for (const buffer of [input, output, ...others]) buffer.destroy();
    },
  };
}

async function prepareNorm(gpu: Gpu, rows: number, hidden: number): Promise<PreparedCase> {
  const norm = await createRmsNorm(gpu, { hidden, epsilon: 1e-5, output: "f16" });
  const input = createStorage(gpu, "input", rows * hidden * 4);
  const weight = createStorage(gpu, "weight", hidden * 4);
  const output = createStorage(gpu, "output", rows * hidden * 2);
  await fillRandom(gpu, input, "floats", 3);
  await fillRandom(gpu, weight, "floats");
  const bound = norm.bind({ input, weight, output });
  return prepared(gpu, {
    rows,
    inputs: hidden,
    outputs: hidden,
    input,
    output,
    others: [weight],
    encode: (pass) => bound.encode(pass, rows),
    reference: async (source) => rmsNormReference(source, new Float32Array(await readBuffer(gpu, weight)), [0], 1e-5),
  });
}

async function prepareSilu(gpu: Gpu, rows: number, width: number): Promise<PreparedCase> {
  const silu = await createSiluMul(gpu, { width, output: "f16" });
  const input = createStorage(gpu, "gate and up", rows * width * 8);
  const output = createStorage(gpu, "output", rows * width * 2);
  await fillRandom(gpu, input, "floats", 3);
  const bound = silu.bind({ gateUp: input, output });
  return prepared(gpu, {
    rows,
    inputs: 2 * width,
    outputs: width,
    input,
    output,
    others: [],
    encode: (pass) => bound.encode(pass, rows),
    reference: async (source) => siluMulReference(source, 1, width),
  });
}

const common = { numerics: "invariant", flops: 0, roof: "bytes" } as const;

function normCase(rows: number, hidden: number): KernelCase {
  return {
    ...common,
    kernel: "RMS norm to f16",
    shape: `${rows} × ${hidden}`,
    variant: "registers",
    peer: `rms-norm f16 ${rows}x${hidden}`,
    bytes: rows * hidden * 6,
    prepare: (gpu) => prepareNorm(gpu, rows, hidden),
  };
}

function siluCase(rows: number, width: number): KernelCase {
  return {
    ...common,
    kernel: "SiLU · up to f16",
    shape: `${rows} × ${width}`,
    variant: "elements",
    peer: `silu-mul f16 ${rows}x${width}`,
    bytes: rows * width * 10,
    prepare: (gpu) => prepareSilu(gpu, rows, width),
  };
}

export const elementwiseCases: CaseList = (size) =>
  size === "tiny"
    ? [normCase(3, 256), siluCase(2, 64)]
    : [normCase(1, 4096), normCase(64, 4096), normCase(2048, 4096), siluCase(2048, 11008)];
