/** Linear layers of few rows: what decode does with the weights, which are read once whatever the rows. */
import {
  copyLinearWeight,
  createLinear,
  createLinearWeight,
  createStorage,
  type GgmlType,
  type Gpu,
  readBuffer,
  uploadStorage,
} from "../../src/index.ts";
import { Random } from "../../src/testing/random.ts";
import { codeWords, scaleWords, weightEncoding } from "../../src/weight-encoding.ts";
import { CaseUnsupportedError } from "../case-error.ts";
import type { CaseList, CaseSize, KernelCase, PreparedCase } from "../kernel-case.ts";
import { linearData, linearReference } from "./linear-data.ts";

interface DecodeLinear {
  readonly type: GgmlType;
  readonly rows: number;
  readonly columns: number;
  readonly outputs: number;
  readonly numerics: "invariant" | "fast";
  readonly floor?: string;
}

const LARGE = { columns: 4096, outputs: 11008 };
const SMALL = { columns: 576, outputs: 1536 };
/** For up to eight rows, of stored bytes. */
const VECTOR_FLOORS = { F16: "≥ 4.0 TB/s", Q8_0: "≥ 3.3 TB/s", Q4_0: "≥ 2.5 TB/s" } as const;
const SKINNY_FLOOR = "≥ 2.2 TB/s";

function fullShapes(): DecodeLinear[] {
  const modes = ["invariant", "fast"] as const;
  const quantized = ["Q8_0", "Q4_0"] as const;
  const few = [1, 2, 8].flatMap((rows) =>
    modes.map((numerics) => ({ type: "F16", rows, ...LARGE, numerics, floor: VECTOR_FLOORS.F16 }) as const),
  );
  const skinny = [16, 64, 128].map((rows) => {
    return { type: "F16", rows, ...LARGE, numerics: "invariant", floor: SKINNY_FLOOR } as const;
  });
  const packed = quantized.flatMap((type) => {
    const floor = VECTOR_FLOORS[type];
    return [
      ...modes.map((numerics) => ({ type, rows: 1, ...LARGE, numerics, floor })),
      { type, rows: 8, ...LARGE, numerics: "invariant", floor } as const,
      { type, rows: 64, ...LARGE, numerics: "invariant" } as const,
    ];
  });
  const small = (["F16", ...quantized] as const).flatMap((type) =>
    modes.map((numerics) => ({ type, rows: 1, ...SMALL, numerics })),
  );
  return [...few, ...skinny, ...packed, ...small, { type: "F16", rows: 8, ...SMALL, numerics: "invariant" }];
}

const TINY: readonly DecodeLinear[] = [
  { type: "F16", rows: 2, columns: 64, outputs: 36, numerics: "fast" },
  { type: "Q8_0", rows: 3, columns: 96, outputs: 48, numerics: "invariant" },
];

/** Copies of the weights are taken in turn, so that they come from memory: more than a GPU's cache holds. */
const ROTATED_BYTES = 250e6;
const MAX_COPIES = 160;
const SAMPLES = 16;

function storedBytes({ type, columns, outputs }: DecodeLinear): number {
  const encoding = weightEncoding(type);
  return outputs * (codeWords(encoding, columns) + scaleWords(encoding, columns)) * 4;
}

async function prepareLinear(gpu: Gpu, size: CaseSize, shape: DecodeLinear): Promise<PreparedCase> {
  const { type, rows, columns, outputs, numerics } = shape;
  if (size === "full" && !gpu.features.subgroupMatrix) throw new CaseUnsupportedError("no subgroup matrices");
  if (gpu.profile !== "hardware") throw new CaseUnsupportedError("matrix kernels belong to the hardware profile");
  const data = linearData(shape);
  const parts = [{ type, rows: outputs, data: data.weights }];
  const first = createLinearWeight(gpu, { label: "linear", parts, columns });
  const count = size === "tiny" ? 2 : Math.min(MAX_COPIES, Math.ceil(ROTATED_BYTES / first.bytes));
  const weights = [
    first,
    ...Array.from({ length: count - 1 }, (_, index) => copyLinearWeight(gpu, first, `linear ${index}`)),
  ];
  const input = uploadStorage(gpu, "linear input", data.input);
  const output = createStorage(gpu, "linear output", rows * outputs * 4);
  const dialect = gpu.features.subgroupMatrix ? "device" : "emulated";
  const options = { phase: "decode", maxRows: rows, accumulate: false, input: "f16", numerics, dialect } as const;
  const bound = await Promise.all(
    weights.map(async (weight) => (await createLinear(gpu, { weight, ...options })).bind({ input, output })),
  );
  let turn = 0;
  return {
    encode(pass) {
      bound[turn++ % bound.length]?.encode(pass, rows);
    },
    poison: () => gpu.device.queue.writeBuffer(output, 0, new Uint32Array(output.size / 4).fill(0x7fc0_dead)),
    async check() {
      const got = new Float32Array(await readBuffer(gpu, output));
      const random = new Random(rows);
      let error = 0;
      let norm = 0;
      for (let sample = 0; sample < SAMPLES; sample++) {
        const row = sample === 0 ? rows - 1 : random.integer(0, rows - 1);
        const at = sample < 2 ? outputs - 1 : random.integer(0, outputs - 1);
        const { want, byte } = linearReference(shape, data, row, at);
        error += ((got[byte / 4] as number) - want) ** 2;
        norm += want ** 2;
      }
      return got.some(Number.isNaN) ? Number.NaN : Math.sqrt(error / norm);
    },
    tolerance: 1e-3,
    destroy() {
      for (const weight of weights) weight.destroy();
      input.destroy();
      output.destroy();
    },
  };
}

/** Decode's linear layers. Bytes are those of the stored weights alone. */
export const decodeLinearCases: CaseList = (size) =>
  (size === "full" ? fullShapes() : TINY).map((shape): KernelCase => {
    const { type, rows, columns, outputs, numerics, floor } = shape;
    return {
      kernel: `decode linear ${type.toLowerCase().replace("_", "-")}`,
      shape: `${rows} rows, ${columns} → ${outputs}`,
      variant: "plain",
      numerics,
      bytes: storedBytes(shape),
      flops: 2 * rows * columns * outputs,
      roof: "bytes",
      peer: `matmul f16 M=${rows} ${columns}->${outputs}`,
      ...(floor === undefined ? {} : { floor }),
      prepare: (gpu) => prepareLinear(gpu, size, shape),
    };
  });
