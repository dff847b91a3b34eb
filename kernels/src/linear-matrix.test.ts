import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { readBuffer, submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { GGML_TYPES, type GgmlType, ggmlBlock } from "./ggml-quants.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { linearReference } from "./linear.reference.ts";
import { createLinear, type LinearDescriptor } from "./linear.ts";
import { createLinearWeight, type LinearWeightPart } from "./linear-weight.ts";
import { siluMulReference } from "./silu-mul.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { randomGgml } from "./testing/ggml-blocks.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { type Random, seededRandom } from "./testing/random.ts";

const PHASES = ["prefill", "decode"] as const;

function randomParts(random: Random, type: GgmlType, columns: number, widths: readonly number[]): LinearWeightPart[] {
  return widths.map((rows) => ({ type, rows, data: randomGgml(random, type, rows * columns) }));
}

/** f16 values as the kernels read them, and the same as f32 for the reference. */
function throughHalf(values: Float32Array) {
  const halves = Uint16Array.from(values, floatToHalf);
  return { halves, floats: Float32Array.from(halves, halfToFloat) };
}

function size(values: ArrayLike<number>): number {
  return Math.sqrt(Array.from(values).reduce((sum, value) => sum + value * value, 0) / values.length);
}

/** Every encoding in prefill; decode's kernels have a test of their own, and few types compute otherwise without f16. */
function typesOf(shaderF16: boolean, phase: (typeof PHASES)[number]): readonly GgmlType[] {
  if (!shaderF16) return ["Q4_1", "Q8_0"];
  return phase === "prefill" ? GGML_TYPES : ["F16", "Q4_0"];
}

describe.each([true, false])("linear with f16 inputs, written out, shader-f16 %s", (shaderF16) => {
  let gpu: Gpu;
  const random = seededRandom(`linear matrix ${shaderF16}`);
  beforeAll(async () => {
    const opened = await openGpu({ profile: "hardware", unchecked: false });
    gpu = { ...opened, features: { ...opened.features, shaderF16: shaderF16 && opened.features.shaderF16 } };
  });
  afterAll(() => gpu.close());

  /** Weights are rounded to f16; in f16 arithmetic, `fma` may round twice. Inputs are f16 already. */
  const TOLERANCE = shaderF16 ? 2e-6 : 3e-7;

  type Case = Pick<LinearDescriptor, "phase" | "accumulate" | "epilogue"> & {
    readonly parts: readonly LinearWeightPart[];
    readonly columns: number;
    readonly before?: Float32Array<ArrayBuffer>;
    /** Outputs of a row before and behind those that are written. */
    readonly margins?: readonly [number, number];
  };

  /** The layer's output bytes; poisoned before, canaries checked. */
  async function runLinear(what: Case, halves: Uint16Array<ArrayBuffer>, rows: number): Promise<ArrayBuffer> {
    const { parts, columns, before, margins = [0, 0], ...options } = what;
    const weight = createLinearWeight(gpu, { label: "w", parts, columns });
    const linear = await createLinear(gpu, { weight, maxRows: 300, input: "f16", dialect: "emulated", ...options });
    const stride = margins[0] + weight.rows + margins[1];
    const output = createPoisoned(
      gpu,
      "output",
      options.epilogue === "silu-mul" ? rows * weight.rows : rows * stride * 4,
    );
    if (before !== undefined) gpu.device.queue.writeBuffer(output.buffer, 0, before);
    const input = uploadStorage(gpu, "input", halves);
    const bound = linear.bind({ input, output: output.buffer, outputStride: stride, outputOffset: margins[0] });
    submitPass(gpu, (pass) => bound.encode(pass, rows));
    const content = await output.read();
    weight.destroy();
    input.destroy();
    output.buffer.destroy();
    if (margins[0] + margins[1] === 0) assertNoPoison("linear", content);
    return content;
  }

  function randomInput(rows: number, columns: number) {
    return throughHalf(random.normals(rows * columns));
  }

  test.each(PHASES.flatMap((phase) => typesOf(shaderF16, phase).map((type) => ({ type, phase }))))(
    "$type, $phase: agrees with the f64 reference on ragged shapes",
    async ({ type, phase }) => {
      for (const rows of [1, random.integer(2, 40)]) {
        const columns = Math.max(32, ggmlBlock(type).elements) * random.integer(1, type.endsWith("K") ? 2 : 5);
        const widths = [4 * random.integer(1, 25), random.pick([4, 28, 32, 36])];
        const outputs = (widths[0] as number) + (widths[1] as number);
        const parts = randomParts(random, type, columns, widths);
        const { halves, floats } = randomInput(rows, columns);
        const accumulate = random.integer(0, 1) === 1;
        const before = random.normals(rows * outputs);
        const content = await runLinear(
          { parts, columns, phase, accumulate, ...(accumulate ? { before } : {}) },
          halves,
          rows,
        );
        const expected = linearReference(floats, rows, columns, parts);
        const scale = size(expected);
        if (accumulate)
          for (const [index, value] of before.entries()) expected[index] = (expected[index] as number) + value;
        assertClose(`${type} ${phase} ${rows}×${columns}×${widths}`, new Float32Array(content), expected, {
          nmse: TOLERANCE,
          maxAbs: 5e-3 * scale,
        });
      }
    },
  );

  test.each(PHASES)("%s: gates and ups become f16 activations", async (phase) => {
    for (const type of ["F16", "Q4_0"] as const) {
      const columns = 96;
      const features = 8 * random.integer(1, 9);
      const rows = random.integer(1, 20);
      const parts = randomParts(random, type, columns, [features, features]);
      const { halves, floats } = randomInput(rows, columns);
      const content = await runLinear({ parts, columns, phase, accumulate: false, epilogue: "silu-mul" }, halves, rows);
      const gateUp = Float32Array.from(linearReference(floats, rows, columns, parts));
      const expected = siluMulReference(gateUp, rows, features);
      const actual = Float32Array.from(new Uint16Array(content), halfToFloat);
      assertClose(`${type} ${phase} ${rows}×${columns}×${features}`, actual, expected, {
        nmse: 4 * TOLERANCE,
        maxAbs: 1e-2 * size(expected),
      });
    }
  });

  test.each(PHASES)("%s: gated outputs are clamped to f16, and NaN stays", async (phase) => {
    const columns = 32;
    const data = new Uint8Array(new Float32Array(32 * columns).fill(8).buffer);
    const halves = new Uint16Array(4 * columns);
    for (const [row, value] of [100, -100, 1, Number.NaN].entries()) {
      halves.fill(floatToHalf(value), row * columns, (row + 1) * columns);
    }
    const what: Case = {
      parts: [{ type: "F32", rows: 32, data }],
      columns,
      phase,
      accumulate: false,
      epilogue: "silu-mul",
    };
    const actual = Float32Array.from(new Uint16Array(await runLinear(what, halves, 4)), halfToFloat);
    expect(actual[0]).toBe(65504);
    expect(Math.abs(actual[16] as number)).toBe(0);
    expect(actual[32]).toBe(65504);
    expect(actual[48]).toBeNaN();
  });

  test.each(PHASES)("%s: a row gets the same bits alone, among others and at any place", async (phase) => {
    for (const type of ["F16", "Q4_1"] as const) {
      const columns = 160;
      const parts = randomParts(random, type, columns, [68]);
      const total = 131;
      const { halves } = randomInput(total, columns);
      const what: Case = { parts, columns, phase, accumulate: false };
      const all = new Float32Array(await runLinear(what, halves, total));
      for (const count of [1, 2, 15, 17, 33, 65]) {
        const first = random.integer(0, total - count);
        const some = await runLinear(what, halves.slice(first * columns, (first + count) * columns), count);
        assertSameBits(
          `${type} ${phase} rows ${first}+${count}`,
          new Float32Array(some),
          all.slice(first * 68, (first + count) * 68),
        );
      }
    }
  });

  test.each(PHASES)("%s: NaN and infinity stay in their row", async (phase) => {
    const columns = 96;
    const parts = randomParts(random, "Q4_0", columns, [40]);
    const { halves } = randomInput(9, columns);
    const what: Case = { parts, columns, phase, accumulate: false };
    const clean = new Float32Array(await runLinear(what, halves, 9));
    halves[4 * columns] = 0x7e00;
    halves[7 * columns + 3] = 0x7c00;
    const actual = new Float32Array(await runLinear(what, halves, 9));
    for (let row = 0; row < 9; row++) {
      const values = actual.slice(row * 40, (row + 1) * 40);
      if (row === 4 || row === 7) expect(values.some(Number.isFinite)).toBe(false);
      else assertSameBits(`${phase} row ${row}`, values, clean.slice(row * 40, (row + 1) * 40));
    }
  });

  test.each(PHASES)("%s: writes only its own columns of a wider output", async (phase) => {
    const columns = 64;
    const parts = randomParts(random, "Q4_0", columns, [40]);
    const { halves, floats } = randomInput(5, columns);
    const margins = [52, 8] as const;
    const values = new Float32Array(await runLinear({ parts, columns, phase, accumulate: false, margins }, halves, 5));
    const expected = linearReference(floats, 5, columns, parts);
    for (let row = 0; row < 5; row++) {
      const actual = values.slice(row * 100 + 52, row * 100 + 92);
      assertClose("window", actual, expected.slice(row * 40, row * 40 + 40), { nmse: TOLERANCE, maxAbs: 1e-2 });
      for (const column of [0, 51, 92, 99]) expect(values[row * 100 + column]).toBeNaN();
    }
  });

  test("refuses shapes that matrices do not take", async () => {
    const make = (type: GgmlType, rows: number, columns: number, more: Partial<LinearDescriptor> = {}) => {
      const weight = createLinearWeight(gpu, {
        label: "w",
        parts: randomParts(random, type, columns, [rows]),
        columns,
      });
      const options = {
        weight,
        phase: "prefill",
        maxRows: 4,
        accumulate: false,
        input: "f16",
        dialect: "emulated",
      } as const;
      return createLinear(gpu, { ...options, ...more });
    };
    await expect(make("F16", 4, 40)).rejects.toThrow(/40 columns/);
    await expect(make("F16", 6, 32)).rejects.toThrow(/6 outputs/);
    await expect(make("F16", 24, 32, { epilogue: "silu-mul" })).rejects.toThrow(/24 gates and ups/);
    await expect(make("F16", 32, 32, { epilogue: "silu-mul", accumulate: true })).rejects.toThrow(/do not accumulate/);
    await expect(make("F16", 32, 32, { epilogue: "silu-mul", input: "f32" })).rejects.toThrow(/needs f16 inputs/);
    await expect(make("F16", 32, 32, { dialect: "device" })).rejects.toThrow(/does not offer/);
    const linear = await make("F16", 32, 32);
    const buffer = uploadStorage(gpu, "b", new Uint8Array(4096));
    expect(() => linear.bind({ input: buffer, output: buffer, outputStride: 34 })).toThrow(/multiples of 4/);
    const gated = await make("F16", 32, 32, { epilogue: "silu-mul" });
    expect(() => gated.bind({ input: buffer, output: buffer, outputStride: 64 })).toThrow(/no stride/);
    expect((await readBuffer(gpu, buffer)).byteLength).toBe(4096);
  });
});
