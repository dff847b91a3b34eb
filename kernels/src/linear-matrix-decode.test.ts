import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { GGML_TYPES, type GgmlType, ggmlBlock } from "./ggml-quants.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { createKernel } from "./kernel.ts";
import { linearReference } from "./linear.reference.ts";
import {
  decodeTileOutputs,
  decodeTileRows,
  linearMatrixDecodeWgsl,
  type MatrixDecodeTile,
} from "./linear-matrix-decode.wgsl.ts";
import { LINEAR_IMMEDIATE_BYTES } from "./linear-parameters.wgsl.ts";
import { createLinearWeight } from "./linear-weight.ts";
import { siluMulReference } from "./silu-mul.ts";
import { matrixDialect } from "./subgroup-matrix.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { randomGgml } from "./testing/ggml-blocks.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { type Random, seededRandom } from "./testing/random.ts";

/** Weights are rounded to f16 (2⁻¹²), some scales too, and code · scale may be larger than the weight. */
const TOLERANCE = 1e-6;

const NARROW: MatrixDecodeTile = { subgroupsM: 1, subgroupsN: 1, tilesM: 1, tilesN: 1, depth: 32, ahead: 2 };

/** The same sums by other workgroups: more rows, more outputs, other steps, another prefetch. */
const WIDE: readonly MatrixDecodeTile[] = [
  { ...NARROW, tilesM: 2, ahead: 1 },
  { ...NARROW, subgroupsM: 2, depth: 64, ahead: 3 },
  { ...NARROW, subgroupsN: 2, depth: 128, ahead: 1 },
  { ...NARROW, depth: 64 },
];

function randomTile(random: Random): MatrixDecodeTile {
  const [subgroupsM, subgroupsN, tilesM, tilesN] = random.pick([
    [1, 1, 1, 1],
    [1, 2, 1, 1],
    [2, 1, 1, 1],
    [1, 1, 2, 1],
    [1, 1, 1, 2],
    [2, 1, 1, 2],
    [1, 1, 1, 3],
  ] as const);
  // 128 columns of more lines would not fit the workgroup memory of software drivers.
  const depths = subgroupsM * tilesM + subgroupsN * tilesN < 4 ? ([32, 64, 128] as const) : ([32, 64] as const);
  return { subgroupsM, subgroupsN, tilesM, tilesN, depth: random.pick(depths), ahead: random.integer(1, 2) };
}

function size(values: ArrayLike<number>): number {
  return Math.sqrt(Array.from(values).reduce((sum, value) => sum + value * value, 0) / values.length);
}

interface Case {
  readonly type: GgmlType;
  readonly data: Uint8Array;
  readonly outputs: number;
  readonly columns: number;
  readonly tile: MatrixDecodeTile;
  readonly gated?: boolean;
  /** Default: unpacks with f16 arithmetic where the device has it. */
  readonly shaderF16?: boolean;
  readonly before?: Float32Array<ArrayBuffer>;
}

describe("decode on matrices, written out", () => {
  let gpu: Gpu;
  const random = seededRandom("linear matrix decode");
  beforeAll(async () => {
    gpu = await openGpu({ profile: "hardware", unchecked: false });
  });
  afterAll(() => gpu.close());

  /** The layer's output bytes; poisoned before, canaries checked. */
  async function run(what: Case, halves: Uint16Array<ArrayBuffer>, rows: number): Promise<ArrayBuffer> {
    const { type, data, outputs, columns, tile, gated = false, shaderF16 = true, before } = what;
    const weight = createLinearWeight(gpu, { label: "w", parts: [{ type, data, rows: outputs }], columns });
    const kernel = await createKernel(gpu, {
      label: `decode ${JSON.stringify(tile)}`,
      code: linearMatrixDecodeWgsl({
        encoding: weight.encoding,
        tile,
        epilogue: gated ? "silu-mul" : "none",
        accumulate: before !== undefined,
        outputs,
        columns,
        dialect: matrixDialect("emulated"),
        shaderF16: shaderF16 && gpu.features.shaderF16,
        unrolled: 1,
      }),
      bindings: ["read", "read", "read", "read_write"],
      immediateBytes: LINEAR_IMMEDIATE_BYTES,
    });
    const output = createPoisoned(gpu, "output", gated ? rows * outputs : rows * outputs * 4);
    if (before !== undefined) gpu.device.queue.writeBuffer(output.buffer, 0, before);
    const input = uploadStorage(gpu, "input", halves);
    const bound = kernel.bind([input, weight.codes, weight.scales, output.buffer]);
    const immediates = new Uint32Array([rows, outputs, columns, outputs, 0, 0, 0, 0]);
    const grid = [Math.ceil(outputs / decodeTileOutputs(tile)), Math.ceil(rows / decodeTileRows(tile))] as const;
    submitPass(gpu, (pass) => bound.encode(pass, immediates, grid));
    const content = await output.read();
    for (const buffer of [weight, input, output.buffer]) buffer.destroy();
    assertNoPoison("decode", content);
    return content;
  }

  function randomInput(rows: number, columns: number) {
    const halves = Uint16Array.from(random.normals(rows * columns), floatToHalf);
    return { halves, floats: Float32Array.from(halves, halfToFloat) };
  }

  test.each(GGML_TYPES)("%s: agrees with the f64 reference for random tiles and ragged shapes", async (type) => {
    const tile = randomTile(random);
    const columns = Math.max(32, ggmlBlock(type).elements) * random.integer(1, type.endsWith("K") ? 2 : 5);
    const outputs = 4 * random.integer(1, 20);
    const rows = random.integer(1, 40);
    const data = randomGgml(random, type, outputs * columns);
    const { halves, floats } = randomInput(rows, columns);
    const before = random.integer(0, 1) === 1 ? random.normals(rows * outputs) : undefined;
    const content = await run(
      {
        type,
        data,
        outputs,
        columns,
        tile,
        shaderF16: random.integer(0, 1) === 1,
        ...(before === undefined ? {} : { before }),
      },
      halves,
      rows,
    );
    const expected = linearReference(floats, rows, columns, [{ type, data, rows: outputs }]);
    const scale = size(expected);
    before?.forEach((value, index) => {
      expected[index] = (expected[index] as number) + value;
    });
    assertClose(`${type} ${rows}×${columns}×${outputs} ${JSON.stringify(tile)}`, new Float32Array(content), expected, {
      nmse: TOLERANCE,
      maxAbs: 5e-3 * scale,
    });
  });

  test.each(["F16", "Q4_0", "Q8_0"] as const)("%s: gates and ups become f16 activations", async (type) => {
    const tile = randomTile(random);
    const columns = 32 * random.integer(1, 5);
    const features = 8 * random.integer(1, 9);
    const rows = random.integer(1, 35);
    const data = randomGgml(random, type, 2 * features * columns);
    const { halves, floats } = randomInput(rows, columns);
    const content = await run(
      { type, data, outputs: 2 * features, columns, tile, gated: true, shaderF16: random.integer(0, 1) === 1 },
      halves,
      rows,
    );
    const gateUp = Float32Array.from(linearReference(floats, rows, columns, [{ type, data, rows: 2 * features }]));
    const expected = siluMulReference(gateUp, rows, features);
    const actual = Float32Array.from(new Uint16Array(content), halfToFloat);
    assertClose(`${type} ${rows}×${columns}×${features} ${JSON.stringify(tile)}`, actual, expected, {
      nmse: 4 * TOLERANCE,
      maxAbs: 1e-2 * size(expected),
    });
  });

  test("a row gets the same bits from every tile, whatever rows lie beside it", async () => {
    for (const type of ["F16", "BF16"] as const) {
      const columns = 224;
      const outputs = 36;
      const total = 37;
      const data = randomGgml(random, type, outputs * columns);
      const { halves } = randomInput(total, columns);
      const what = { type, data, outputs, columns };
      const alone: Float32Array[] = [];
      for (const row of [0, 16, total - 1]) {
        const bits = await run({ ...what, tile: NARROW }, halves.slice(row * columns, (row + 1) * columns), 1);
        alone.push(new Float32Array(bits));
      }
      for (const tile of [NARROW, ...WIDE]) {
        const all = new Float32Array(await run({ ...what, tile }, halves, total));
        for (const [index, row] of [0, 16, total - 1].entries()) {
          const bits = all.slice(row * outputs, (row + 1) * outputs);
          assertSameBits(`${type} row ${row} ${JSON.stringify(tile)}`, bits, alone[index] as Float32Array);
        }
      }
    }
  });

  test("NaN and infinity stay in their row", async () => {
    const columns = 96;
    const data = randomGgml(random, "Q4_0", 40 * columns);
    const { halves } = randomInput(19, columns);
    for (const tile of [NARROW, WIDE[1] as MatrixDecodeTile]) {
      const what: Case = { type: "Q4_0", data, outputs: 40, columns, tile };
      const input = halves.slice();
      const clean = new Float32Array(await run(what, input, 19));
      input[4 * columns] = 0x7e00;
      input[17 * columns + 3] = 0x7c00;
      const actual = new Float32Array(await run(what, input, 19));
      for (let row = 0; row < 19; row++) {
        const values = actual.slice(row * 40, (row + 1) * 40);
        if (row === 4 || row === 17) expect(values.some(Number.isFinite)).toBe(false);
        else assertSameBits(`row ${row}`, values, clean.slice(row * 40, (row + 1) * 40));
      }
    }
  });
});
