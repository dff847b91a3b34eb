import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { GGML_TYPES, type GgmlType, ggmlBlock } from "./ggml-quants.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { createKernel } from "./kernel.ts";
import { linearReference } from "./linear.reference.ts";
import { LINEAR_IMMEDIATE_BYTES } from "./linear-parameters.wgsl.ts";
import { linearVectorWgsl, type VectorTile, vectorTileOutputs } from "./linear-vector.wgsl.ts";
import { createLinearWeight } from "./linear-weight.ts";
import { siluMulReference } from "./silu-mul.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { randomGgml } from "./testing/ggml-blocks.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { type Random, seededRandom } from "./testing/random.ts";

function size(values: ArrayLike<number>): number {
  return Math.sqrt(Array.from(values).reduce((sum, value) => sum + value * value, 0) / values.length);
}

function randomTile(random: Random): VectorTile {
  // Software drivers compile for minutes what is written out much more often than this.
  const [outputs, loads] = random.pick([
    [1, 1],
    [1, 2],
    [2, 1],
  ] as const);
  return { outputs, loads, subgroups: random.pick([1, 4]) };
}

interface Case {
  readonly type: GgmlType;
  readonly data: Uint8Array;
  readonly outputs: number;
  readonly columns: number;
  readonly tile: VectorTile;
  /** Rows that the kernel is made for. */
  readonly rows: number;
  readonly gated?: boolean;
  readonly before?: Float32Array<ArrayBuffer>;
}

describe.each([true, false])("vector decode, shader-f16 %s", (shaderF16) => {
  let gpu: Gpu;
  const random = seededRandom(`linear vector ${shaderF16}`);
  beforeAll(async () => {
    gpu = await openGpu({ profile: "hardware", unchecked: false });
  });
  afterAll(() => gpu.close());

  /** The layer's output bytes; poisoned before, canaries checked. */
  async function run(what: Case, halves: Uint16Array<ArrayBuffer>, rows: number): Promise<ArrayBuffer> {
    const { type, data, outputs, columns, tile, gated = false, before } = what;
    const epilogue = gated ? "silu-mul" : "none";
    const weight = createLinearWeight(gpu, { label: "w", parts: [{ type, data, rows: outputs }], columns });
    const kernel = await createKernel(gpu, {
      label: `vector ${JSON.stringify(tile)}`,
      code: linearVectorWgsl({
        encoding: weight.encoding,
        tile,
        rows: what.rows,
        outputs,
        columns,
        epilogue,
        lanes: gpu.features.subgroupSize,
        shaderF16: shaderF16 && gpu.features.shaderF16,
      }),
      bindings: ["read", "read", "read", "read_write"],
      immediateBytes: LINEAR_IMMEDIATE_BYTES,
    });
    const output = createPoisoned(gpu, "output", gated ? rows * outputs : rows * outputs * 4);
    if (before !== undefined) gpu.device.queue.writeBuffer(output.buffer, 0, before);
    const input = uploadStorage(gpu, "input", halves);
    const bound = kernel.bind([input, weight.codes, weight.scales, output.buffer]);
    const immediates = new Uint32Array([rows, outputs, columns, outputs, 0, 0, before === undefined ? 0 : 1, 0]);
    const features = gated ? outputs / 2 : outputs;
    submitPass(gpu, (pass) =>
      bound.encode(pass, immediates, [Math.ceil(features / vectorTileOutputs(tile, epilogue)), 1]),
    );
    const content = await output.read();
    for (const buffer of [weight, input, output.buffer]) buffer.destroy();
    assertNoPoison("vector", content);
    return content;
  }

  function randomInput(rows: number, columns: number) {
    const halves = Uint16Array.from(random.normals(rows * columns), floatToHalf);
    return { halves, floats: Float32Array.from(halves, halfToFloat) };
  }

  test.each(GGML_TYPES)("%s: agrees with the f64 reference for random tiles and ragged shapes", async (type) => {
    for (const rows of [1, 2]) {
      const tile = randomTile(random);
      const columns = Math.max(32, ggmlBlock(type).elements) * random.integer(1, type.endsWith("K") ? 2 : 9);
      const outputs = 4 * random.integer(1, 25);
      const data = randomGgml(random, type, outputs * columns);
      const { halves, floats } = randomInput(rows, columns);
      const before = random.integer(0, 1) === 1 ? random.normals(rows * outputs) : undefined;
      const more = before === undefined ? {} : { before };
      // A kernel for many rows also takes fewer.
      const made = Math.min(2, rows + random.integer(0, 1));
      const content = await run({ type, data, outputs, columns, tile, rows: made, ...more }, halves, rows);
      const expected = linearReference(floats, rows, columns, [{ type, data, rows: outputs }]);
      const scale = size(expected);
      before?.forEach((value, index) => {
        expected[index] = (expected[index] as number) + value;
      });
      const context = `${type} ${rows}×${columns}×${outputs} ${JSON.stringify(tile)}`;
      assertClose(context, new Float32Array(content), expected, { nmse: 1e-11, maxAbs: 1e-3 * scale });
    }
  });

  test.each(["F16", "Q4_0", "Q8_0", "Q6_K"] as const)("%s: gates and ups become f16 activations", async (type) => {
    const tile = { outputs: 2, loads: 1, subgroups: random.pick([2, 4]) };
    const columns = ggmlBlock(type).elements === 256 ? 256 : 32 * random.integer(1, 7);
    const features = 8 * random.integer(1, 9);
    const rows = random.integer(1, 2);
    const data = randomGgml(random, type, 2 * features * columns);
    const { halves, floats } = randomInput(rows, columns);
    const content = await run({ type, data, outputs: 2 * features, columns, tile, rows, gated: true }, halves, rows);
    const gateUp = Float32Array.from(linearReference(floats, rows, columns, [{ type, data, rows: 2 * features }]));
    const expected = siluMulReference(gateUp, rows, features);
    const actual = Float32Array.from(new Uint16Array(content), halfToFloat);
    assertClose(`${type} ${rows}×${columns}×${features} ${JSON.stringify(tile)}`, actual, expected, {
      nmse: 1e-6,
      maxAbs: 1e-2 * size(expected),
    });
  });

  test("the same row gets the same bits in both places, and NaN stays in its row", async () => {
    const columns = 160;
    const data = randomGgml(random, "Q8_0", 40 * columns);
    const { halves } = randomInput(1, columns);
    const twice = new Uint16Array(2 * columns);
    twice.set(halves, 0);
    twice.set(halves, columns);
    const what: Case = { type: "Q8_0", data, outputs: 40, columns, tile: randomTile(random), rows: 2 };
    const both = new Float32Array(await run(what, twice, 2));
    assertSameBits("both places", both.slice(40), both.slice(0, 40));
    twice[columns + 7] = 0x7e00;
    const broken = new Float32Array(await run(what, twice, 2));
    assertSameBits("beside NaN", broken.slice(0, 40), both.slice(0, 40));
    expect(broken.slice(40).some(Number.isFinite)).toBe(false);
  });
});
