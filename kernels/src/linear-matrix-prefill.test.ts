import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import type { GgmlType } from "./ggml-quants.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { createKernel } from "./kernel.ts";
import { linearReference } from "./linear.reference.ts";
import { linearMatrixPrefillWgsl, type MatrixPrefillOptions } from "./linear-matrix-prefill.wgsl.ts";
import { LINEAR_IMMEDIATE_BYTES } from "./linear-parameters.wgsl.ts";
import { createLinearWeight, type LinearWeight } from "./linear-weight.ts";
import { type MatrixTile, tileOutputs, tileRows } from "./matrix-tile.ts";
import { matrixDialect } from "./subgroup-matrix.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { randomGgml } from "./testing/ggml-blocks.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";

const ONE: MatrixTile = { subgroupsM: 1, subgroupsN: 1, tilesM: 1, tilesN: 2 };

type Options = Pick<MatrixPrefillOptions, "tile" | "depth" | "wholeRows" | "wholeOutputs">;

/** The same sums by other workgroups: more subgroups, more sums in each, longer steps, N and K in the text or not. */
const OTHERS: readonly (Options & { readonly constant: boolean })[] = [
  { tile: { ...ONE, subgroupsM: 2, subgroupsN: 2 }, depth: 64, wholeRows: true, wholeOutputs: true, constant: true },
  { tile: { ...ONE, tilesM: 2 }, depth: 32, wholeRows: true, wholeOutputs: false, constant: false },
  { tile: { ...ONE, subgroupsN: 2 }, depth: 64, wholeRows: false, wholeOutputs: true, constant: true },
];

describe("prefill on matrices, written out", () => {
  let gpu: Gpu;
  const random = seededRandom("linear matrix prefill");
  beforeAll(async () => {
    gpu = await openGpu({ profile: "hardware", unchecked: false });
  });
  afterAll(() => gpu.close());

  async function run(weight: LinearWeight, halves: Uint16Array<ArrayBuffer>, options: MatrixPrefillOptions) {
    const { rows: n, columns } = weight;
    const rows = halves.length / columns;
    const kernel = await createKernel(gpu, {
      label: "prefill",
      code: linearMatrixPrefillWgsl(options),
      bindings: ["read", "read", "read", "read_write"],
      immediateBytes: LINEAR_IMMEDIATE_BYTES,
    });
    const output = createPoisoned(gpu, "output", rows * n * 4);
    const input = uploadStorage(gpu, "input", halves);
    const bound = kernel.bind([input, weight.codes, weight.scales, output.buffer]);
    const grid = [Math.ceil(rows / tileRows(options.tile)), Math.ceil(n / tileOutputs(options.tile))] as const;
    submitPass(gpu, (pass) => bound.encode(pass, new Uint32Array([rows, n, columns, n, 0, 0, 0, 0]), grid));
    const content = await output.read();
    input.destroy();
    output.buffer.destroy();
    assertNoPoison("prefill", content);
    return new Float32Array(content);
  }

  test.each([1, 2] as const)("%i slices: no tile, step or constant changes a bit", async (slices) => {
    for (const type of ["F16", "Q4_0"] as const satisfies readonly GgmlType[]) {
      const columns = 192;
      const outputs = 4 * random.integer(16, 24);
      const rows = random.integer(33, 50);
      const data = randomGgml(random, type, outputs * columns);
      const weight = createLinearWeight(gpu, { label: "w", parts: [{ type, rows: outputs, data }], columns });
      const halves = Uint16Array.from(random.normals(rows * columns), floatToHalf);
      const common = {
        encoding: weight.encoding,
        slices,
        epilogue: "none",
        accumulate: false,
        dialect: matrixDialect("emulated"),
        shaderF16: gpu.features.shaderF16,
      } as const;
      const first = await run(weight, halves, {
        ...common,
        tile: ONE,
        depth: 32,
        wholeRows: false,
        wholeOutputs: false,
      });
      const expected = linearReference(Float32Array.from(halves, halfToFloat), rows, columns, [
        { type, rows: outputs, data },
      ]);
      assertClose(`${type} ${rows}×${columns}×${outputs}`, first, expected, { nmse: 2e-6, maxAbs: 2e-2 });
      for (const { constant, ...options } of OTHERS) {
        if (slices === 2 && options.depth === 64) continue;
        const shape = constant ? { shape: { outputs, columns } } : {};
        const other = await run(weight, halves, {
          ...common,
          ...options,
          ...shape,
          dialect: matrixDialect("emulated"),
        });
        assertSameBits(`${type} ${slices} slices ${JSON.stringify(options)}`, other, first);
      }
      weight.destroy();
    }
  });

  test("the sums of two slices are not those of one", async () => {
    const columns = 192;
    const weight = createLinearWeight(gpu, {
      label: "w",
      parts: [{ type: "F32", rows: 32, data: randomGgml(random, "F32", 32 * columns) }],
      columns,
    });
    const halves = Uint16Array.from(random.normals(16 * columns), floatToHalf);
    const [one, two] = await Promise.all(
      ([1, 2] as const).map((slices) =>
        run(weight, halves, {
          encoding: weight.encoding,
          tile: ONE,
          slices,
          depth: 32,
          epilogue: "none",
          accumulate: false,
          wholeRows: false,
          wholeOutputs: false,
          dialect: matrixDialect("emulated"),
          shaderF16: false,
        }),
      ),
    );
    expect(one).not.toEqual(two);
  });
});
