import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createStorage, submitPass, uploadStorage } from "./buffers.ts";
import { type DeviceProfile, type Gpu, openGpu } from "./device.ts";
import { GGML_TYPES, type GgmlType, ggmlBlock } from "./ggml-quants.ts";
import { linearReference } from "./linear.reference.ts";
import { createLinear, type LinearDescriptor } from "./linear.ts";
import { createLinearWeight, LinearWeightMixError, type LinearWeightPart } from "./linear-weight.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { randomGgml } from "./testing/ggml-blocks.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { type Random, seededRandom } from "./testing/random.ts";

/** Of a device that binds almost nothing. */
const LIMITS = { maxStorageBufferBindingSize: 16, maxBufferSize: 1024 };
const PHASES = ["prefill", "decode"] as const;

function randomParts(random: Random, type: GgmlType, columns: number, widths: readonly number[]): LinearWeightPart[] {
  return widths.map((rows) => ({ type, rows, data: randomGgml(random, type, rows * columns) }));
}

describe.each(["software", "hardware"] as const)("linear, %s profile", (profile: DeviceProfile) => {
  let gpu: Gpu;
  const random = seededRandom(`linear ${profile}`);
  beforeAll(async () => {
    gpu = await openGpu({ profile, unchecked: false });
  });
  afterAll(() => gpu.close());

  interface Case {
    readonly parts: readonly LinearWeightPart[];
    readonly columns: number;
    readonly phase: LinearDescriptor["phase"];
    readonly accumulate: boolean;
  }

  /** Runs rows of `input` through one layer; outputs are poisoned, canaries checked. */
  async function runLinear(
    what: Case,
    input: Float32Array<ArrayBuffer>,
    rows: number,
    before?: Float32Array<ArrayBuffer>,
    device = gpu,
  ) {
    const weight = createLinearWeight(gpu, { label: "w", parts: what.parts, columns: what.columns });
    const linear = await createLinear(device, { weight, phase: what.phase, maxRows: 200, accumulate: what.accumulate });
    const output = createPoisoned(gpu, "output", rows * weight.rows * 4);
    if (before !== undefined) gpu.device.queue.writeBuffer(output.buffer, 0, before);
    const inputBuffer = uploadStorage(gpu, "input", input);
    const bound = linear.bind({ input: inputBuffer, output: output.buffer });
    submitPass(gpu, (pass) => bound.encode(pass, rows));
    const content = await output.read();
    weight.destroy();
    inputBuffer.destroy();
    output.buffer.destroy();
    assertNoPoison("linear", content);
    return new Float32Array(content);
  }

  test.each(GGML_TYPES.flatMap((type) => PHASES.map((phase) => ({ type, phase }))))(
    "$type, $phase: agrees with the f64 reference on ragged shapes",
    async ({ type, phase }) => {
      const block = Math.max(type === "F32" ? 4 : 8, ggmlBlock(type).elements);
      for (const rows of [1, 3, random.integer(4, 70)]) {
        const columns = block * random.integer(1, type.endsWith("K") ? 3 : 9);
        const widths = [random.integer(1, 70), random.pick([1, 31, 32, 33, 64])];
        const parts = randomParts(random, type, columns, widths);
        const outputs = (widths[0] as number) + (widths[1] as number);
        const input = random.normals(rows * columns);
        const accumulate = random.integer(0, 1) === 1;
        const before = random.normals(rows * outputs);
        const actual = await runLinear(
          { parts, columns, phase, accumulate },
          input,
          rows,
          accumulate ? before : undefined,
        );
        const expected = linearReference(input, rows, columns, parts);
        if (accumulate)
          for (const [index, value] of before.entries()) expected[index] = (expected[index] as number) + value;
        const scale = Math.sqrt(expected.reduce((sum, value) => sum + value * value, 0) / expected.length);
        assertClose(`${type} ${phase} ${rows}×${columns}×${widths}`, actual, expected, {
          nmse: 1e-11,
          maxAbs: 2e-4 * scale,
        });
      }
    },
  );

  test.each(PHASES)("%s: a row gets the same bits alone, among others and at any place", async (phase) => {
    for (const type of ["Q4_1", "Q8_0", "F16", "Q6_K"] as const) {
      const columns = ggmlBlock(type).elements === 256 ? 512 : 320;
      const parts = randomParts(random, type, columns, [97]);
      const total = 131;
      const input = random.normals(total * columns);
      const what: Case = { parts, columns, phase, accumulate: false };
      const all = await runLinear(what, input, total);
      for (const count of [1, 2, 3, 7, 8, 9, 63, 65]) {
        const first = random.integer(0, total - count);
        const some = await runLinear(what, input.slice(first * columns, (first + count) * columns), count);
        assertSameBits(`${type} ${phase} rows ${first}+${count}`, some, all.slice(first * 97, (first + count) * 97));
      }
    }
  });

  test.each(["F32", "F16", "BF16", "Q4_1", "Q8_0", "Q4_K", "Q6_K"] as const)(
    "%s: long rows, with and without subgroups",
    async (type) => {
      const columns = 1536;
      const parts = randomParts(random, type, columns, [21]);
      const input = random.normals(6 * columns);
      const expected = linearReference(input, 6, columns, parts);
      const scale = Math.sqrt(expected.reduce((sum, value) => sum + value * value, 0) / expected.length);
      const plain: Gpu = { ...gpu, features: { ...gpu.features, subgroups: false, subgroupSize: 1 } };
      for (const device of [gpu, plain]) {
        for (const phase of PHASES) {
          const actual = await runLinear({ parts, columns, phase, accumulate: false }, input, 6, undefined, device);
          assertClose(`${type} ${phase}`, actual, expected, { nmse: 1e-11, maxAbs: 2e-4 * scale });
        }
      }
    },
  );

  test.each([
    { type: "Q4_0", columns: 96 },
    // Columns that end inside a tile of the walk over K.
    { type: "F32", columns: 36 },
    { type: "F16", columns: 40 },
  ] as const)("NaN and infinity stay in their row: $type, $columns columns", async ({ type, columns }) => {
    const parts = randomParts(random, type, columns, [40]);
    for (const phase of PHASES) {
      const input = random.normals(9 * columns);
      const clean = await runLinear({ parts, columns, phase, accumulate: false }, input, 9);
      input[4 * columns] = Number.NaN;
      input[7 * columns + 3] = Number.POSITIVE_INFINITY;
      const actual = await runLinear({ parts, columns, phase, accumulate: false }, input, 9);
      for (let row = 0; row < 9; row++) {
        const values = actual.slice(row * 40, (row + 1) * 40);
        if (row === 4 || row === 7) expect(values.some(Number.isFinite)).toBe(false);
        else assertSameBits(`${phase} row ${row}`, values, clean.slice(row * 40, (row + 1) * 40));
      }
    }
  });

  test("a NaN weight stays in its output", async () => {
    const columns = 36;
    const parts = randomParts(random, "F32", columns, [40]);
    const data = parts[0]?.data as Uint8Array;
    new DataView(data.buffer, data.byteOffset).setFloat32(17 * columns * 4, Number.NaN, true);
    for (const phase of PHASES) {
      const values = await runLinear({ parts, columns, phase, accumulate: false }, random.normals(3 * columns), 3);
      for (const [index, value] of values.entries()) expect(Number.isNaN(value)).toBe(index % 40 === 17);
    }
  });

  test("a vocabulary beyond 65535 workgroups of four outputs", async () => {
    const outputs = 4 * 65535 + 7;
    const parts = randomParts(random, "Q4_0", 32, [outputs]);
    const input = random.normals(2 * 32);
    const expected = linearReference(input, 2, 32, parts);
    for (const phase of PHASES) {
      const actual = await runLinear({ parts, columns: 32, phase, accumulate: false }, input, 2);
      assertClose(`${phase} ${outputs}`, actual, expected, { nmse: 1e-11, maxAbs: 1e-4 });
    }
  });

  test("the same input gives the same bits twice", async () => {
    const columns = 256;
    const parts = randomParts(random, "Q8_0", columns, [130]);
    const input = random.normals(70 * columns);
    for (const phase of PHASES) {
      const first = await runLinear({ parts, columns, phase, accumulate: false }, input, 70);
      assertSameBits(phase, await runLinear({ parts, columns, phase, accumulate: false }, input, 70), first);
    }
  });

  test("writes only its own columns of a wider output", async () => {
    const columns = 64;
    const parts = randomParts(random, "Q4_0", columns, [40]);
    const weight = createLinearWeight(gpu, { label: "w", parts, columns });
    const input = random.normals(5 * columns);
    for (const phase of PHASES) {
      const linear = await createLinear(gpu, { weight, phase, maxRows: 5, accumulate: false });
      const output = createPoisoned(gpu, "output", 5 * 100 * 4);
      const bound = linear.bind({
        input: uploadStorage(gpu, "input", input),
        output: output.buffer,
        outputStride: 100,
        outputOffset: 50,
      });
      submitPass(gpu, (pass) => bound.encode(pass, 5));
      const values = new Float32Array(await output.read());
      const expected = linearReference(input, 5, columns, parts);
      for (let row = 0; row < 5; row++) {
        const actual = values.slice(row * 100 + 50, row * 100 + 90);
        assertClose("window", actual, expected.slice(row * 40, row * 40 + 40), { nmse: 1e-11, maxAbs: 1e-3 });
        for (const column of [0, 49, 90, 99]) expect(values[row * 100 + column]).toBeNaN();
      }
    }
  });

  test("large and tiny values keep their relative precision", async () => {
    const columns = 256;
    const parts = randomParts(random, "F32", columns, [33]);
    for (const size of [65504, 1e-20]) {
      const input = random.normals(4 * columns, size);
      const expected = linearReference(input, 4, columns, parts);
      for (const phase of PHASES) {
        const actual = await runLinear({ parts, columns, phase, accumulate: false }, input, 4);
        assertClose(`size ${size}`, actual, expected, { nmse: 1e-11, maxAbs: 1e-4 * size });
      }
    }
  });

  test("refuses wrong shapes with the reason", async () => {
    const data = randomGgml(random, "Q4_0", 64);
    const make = (parts: LinearWeightPart[], columns: number) => () =>
      createLinearWeight(gpu, { label: "w", parts, columns });
    expect(make([{ type: "Q4_0", rows: 2, data }], 33)).toThrow(
      /33 columns of Q4_0, must be a positive multiple of 32/,
    );
    expect(make([{ type: "Q4_0", rows: 3, data }], 32)).toThrow(/36 bytes of Q4_0 for 3 × 32, expected 54/);
    expect(make([], 32)).toThrow(/no parts/);
    const mixed: LinearWeightPart[] = [
      { type: "Q4_0", rows: 2, data },
      { type: "Q8_0", rows: 2, data: randomGgml(random, "Q8_0", 64) },
    ];
    expect(make(mixed, 32)).toThrow(LinearWeightMixError);
    const small = {
      ...gpu,
      device: new Proxy(gpu.device, {
        get: (target, name) => (name === "limits" ? { ...LIMITS } : target[name as never]),
      }),
    };
    const tooLarge = () =>
      createLinearWeight(small, { label: "w", parts: [{ type: "Q4_0", rows: 2, data }], columns: 32 });
    expect(tooLarge).toThrow(/w codes: 32 bytes, this device binds at most 16/);
    const weight = make([{ type: "Q4_0", rows: 2, data }], 32)();
    const linear = await createLinear(gpu, { weight, phase: "decode", maxRows: 2, accumulate: false });
    const buffer = createStorage(gpu, "b", 1024);
    expect(() => linear.bind({ input: buffer, output: buffer, outputStride: 2, outputOffset: 1 })).toThrow(
      /do not fit/,
    );
    await expect(createLinear(gpu, { weight, phase: "decode", maxRows: 0, accumulate: false })).rejects.toThrow(
      /maxRows 0/,
    );
  });
});
