/** Linear layers of many rows: prefill on subgroup matrices. */
import {
  createLinear,
  createLinearWeight,
  createStorage,
  type GgmlType,
  type Gpu,
  ggmlByteLength,
  halfToFloat,
  type LinearEpilogue,
  readBuffer,
  uploadStorage,
} from "../../src/index.ts";
import { Random } from "../../src/testing/random.ts";
import { CaseUnsupportedError } from "../case-error.ts";
import type { CaseSize, KernelCase, PreparedCase } from "../kernel-case.ts";
import { linearData, linearReference } from "./linear-data.ts";

interface GemmShape {
  readonly type: GgmlType;
  readonly rows: number;
  readonly columns: number;
  readonly outputs: number;
  readonly accumulate?: boolean;
  readonly epilogue?: LinearEpilogue;
  readonly floor?: string;
}

const FULL: readonly GemmShape[] = [
  { type: "F16", rows: 512, columns: 4096, outputs: 11008, floor: "≥ 230 TFLOP/s" },
  { type: "F16", rows: 2048, columns: 4096, outputs: 11008, floor: "≥ 300 TFLOP/s" },
  { type: "Q8_0", rows: 512, columns: 4096, outputs: 11008, floor: "≥ 200 TFLOP/s" },
  { type: "Q8_0", rows: 2048, columns: 4096, outputs: 11008, floor: "≥ 200 TFLOP/s" },
  { type: "Q4_0", rows: 512, columns: 4096, outputs: 11008, floor: "≥ 200 TFLOP/s" },
  { type: "Q4_0", rows: 2048, columns: 4096, outputs: 11008, floor: "≥ 200 TFLOP/s" },
  { type: "Q4_K", rows: 2048, columns: 4096, outputs: 11008 },
  { type: "Q6_K", rows: 2048, columns: 4096, outputs: 11008 },
  { type: "F16", rows: 512, columns: 4096, outputs: 22016, epilogue: "silu-mul" },
  { type: "F16", rows: 512, columns: 4096, outputs: 4096, accumulate: true },
  { type: "F16", rows: 2048, columns: 4096, outputs: 4096, accumulate: true },
  { type: "F16", rows: 512, columns: 11008, outputs: 4096, accumulate: true },
  { type: "F16", rows: 2048, columns: 11008, outputs: 4096, accumulate: true },
  { type: "F16", rows: 512, columns: 4096, outputs: 12288 },
  { type: "F16", rows: 512, columns: 576, outputs: 1536 },
];

const TINY: readonly GemmShape[] = [
  { type: "F16", rows: 20, columns: 64, outputs: 36, accumulate: true },
  { type: "Q4_0", rows: 33, columns: 96, outputs: 48, epilogue: "silu-mul" },
];

/** Rows and outputs that are compared with the reference. */
const SAMPLES = 12;

async function prepareGemm(gpu: Gpu, size: CaseSize, shape: GemmShape): Promise<PreparedCase> {
  const { type, rows, columns, outputs, accumulate = false, epilogue = "none" } = shape;
  if (size === "full" && !gpu.features.subgroupMatrix) throw new CaseUnsupportedError("no subgroup matrices");
  if (gpu.profile !== "hardware") throw new CaseUnsupportedError("matrix kernels belong to the hardware profile");
  const data = linearData(shape);
  const weight = createLinearWeight(gpu, {
    label: "gemm",
    parts: [{ type, rows: outputs, data: data.weights }],
    columns,
  });
  const linear = await createLinear(gpu, {
    weight,
    phase: "prefill",
    maxRows: rows,
    accumulate,
    input: "f16",
    epilogue,
    dialect: gpu.features.subgroupMatrix ? "device" : "emulated",
  });
  const gated = epilogue === "silu-mul";
  const input = uploadStorage(gpu, "gemm input", data.input);
  const output = createStorage(gpu, "gemm output", gated ? rows * outputs : rows * outputs * 4);
  const bound = linear.bind({ input, output });
  return {
    encode: (pass) => bound.encode(pass, rows),
    poison() {
      // What is added to starts at 0.
      const word = accumulate ? 0 : gated ? 0x7e00_7e00 : 0x7fc0_dead;
      gpu.device.queue.writeBuffer(output, 0, new Uint32Array(output.size / 4).fill(word));
    },
    async check() {
      let error = 0;
      let norm = 0;
      const random = new Random(rows);
      const last = gated ? outputs / 2 - 1 : outputs - 1;
      for (let sample = 0; sample < SAMPLES; sample++) {
        const row = sample === 0 ? rows - 1 : random.integer(0, rows - 1);
        const { want, byte } = linearReference(shape, data, row, sample < 2 ? last : random.integer(0, last));
        const word = await readBuffer(gpu, output, byte - (byte % 4), 4);
        const got = gated
          ? halfToFloat(new Uint16Array(word)[(byte % 4) / 2] as number)
          : (new Float32Array(word)[0] as number);
        error += (got - want) ** 2;
        norm += want ** 2;
      }
      return Math.sqrt(error / norm);
    },
    tolerance: gated ? 2e-3 : 1e-3,
    destroy() {
      weight.destroy();
      input.destroy();
      output.destroy();
    },
  };
}

/** Prefill's linear layers. */
export function gemmCases(size: CaseSize): readonly KernelCase[] {
  return (size === "full" ? FULL : TINY).map((shape) => {
    const { type, rows, columns, outputs, accumulate = false, epilogue = "none", floor } = shape;
    const outputBytes = epilogue === "silu-mul" ? rows * outputs : rows * outputs * (accumulate ? 8 : 4);
    return {
      kernel: `GEMM ${type.toLowerCase().replace("_", "-")}`,
      shape: `${rows} rows, ${columns} → ${outputs}`,
      variant:
        [epilogue === "silu-mul" ? "gated" : "", accumulate ? "added" : ""].filter(Boolean).join(", ") || "plain",
      numerics: "invariant",
      bytes: rows * columns * 2 + ggmlByteLength(type, outputs * columns) + outputBytes,
      flops: 2 * rows * columns * outputs,
      roof: "matrix",
      peer: `matmul f16 M=${rows} ${columns}->${outputs}`,
      ...(floor === undefined ? {} : { floor }),
      prepare: (gpu) => prepareGemm(gpu, size, shape),
    } satisfies KernelCase;
  });
}
