import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { halfToFloat } from "./half.ts";
import { createRmsNorm, rmsNormReference } from "./rms-norm.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";

describe("rms-norm", () => {
  let gpu: Gpu;
  const random = seededRandom("rms-norm");
  beforeAll(async () => {
    gpu = await openGpu({ unchecked: false });
  });
  afterAll(() => gpu.close());

  interface Run {
    readonly input: Float32Array;
    readonly weight: Float32Array;
    readonly epsilon?: number;
    readonly count: number;
    readonly gather?: number[];
    readonly output?: "f32" | "f16";
    readonly variant: "loops" | "registers";
  }

  async function runNorm({ input, weight, epsilon = 1e-5, count, gather, output: type = "f32", variant }: Run) {
    const hidden = weight.length;
    const norm = await createRmsNorm(gpu, { hidden, epsilon, output: type, variant });
    const output = createPoisoned(gpu, "output", count * hidden * (type === "f16" ? 2 : 4));
    const bound = norm.bind({
      input: uploadStorage(gpu, "input", input),
      weight: uploadStorage(gpu, "weight", weight),
      output: output.buffer,
      ...(gather === undefined ? {} : { rowIndices: uploadStorage(gpu, "rows", Uint32Array.from(gather)) }),
    });
    submitPass(gpu, (pass) => bound.encode(pass, count));
    const content = await output.read();
    assertNoPoison("rms-norm", content);
    return type === "f16" ? Float32Array.from(new Uint16Array(content), halfToFloat) : new Float32Array(content);
  }

  test.each(["loops", "registers"] as const)("%s agrees with the reference, gathered or not", async (variant) => {
    for (const hidden of [4, 60, 64, 252, 256, 260, 576, 4 * random.integer(1, 1100), 8200]) {
      const rows = random.integer(1, 9);
      const size = random.pick([1, 1e-4, 1e4]);
      const input = random.normals(rows * hidden, size);
      const weight = random.normals(hidden, 1, 1);
      const epsilon = random.pick([1e-5, 1e-6]);
      const inOrder = Array.from({ length: rows }, (_, row) => row);
      const gather = Array.from({ length: random.integer(1, 12) }, () => random.integer(0, rows - 1));
      const tolerance = { nmse: 1e-12, maxAbs: 5e-5 };
      const context = `hidden ${hidden}, size ${size}`;
      const direct = await runNorm({ input, weight, epsilon, count: rows, variant });
      assertClose(context, direct, rmsNormReference(input, weight, inOrder, epsilon), tolerance);
      const gathered = await runNorm({ input, weight, epsilon, count: gather.length, gather, variant });
      assertClose(`${context} gathered`, gathered, rmsNormReference(input, weight, gather, epsilon), tolerance);
      for (const [index, row] of gather.entries()) {
        const actual = gathered.slice(index * hidden, (index + 1) * hidden);
        assertSameBits(context, actual, direct.slice(row * hidden, (row + 1) * hidden));
      }
    }
  });

  test.each(["loops", "registers"] as const)("%s writes f16: rounded, clamped, NaN kept", async (variant) => {
    for (const hidden of [64, 260, 4 * random.integer(1, 600)]) {
      const rows = random.integer(2, 4);
      const input = random.normals(rows * hidden);
      const weight = random.normals(hidden, 1, 1);
      weight[0] = 1e6;
      weight[1] = -1e6;
      weight[2] = 1e-5;
      input[(rows - 1) * hidden + 3] = Number.NaN;
      const actual = await runNorm({ input, weight, count: rows, output: "f16", variant });
      const inOrder = Array.from({ length: rows }, (_, row) => row);
      const expected = rmsNormReference(input, weight, inOrder, 1e-5);
      for (let index = 0; index < (rows - 1) * hidden; index++) {
        const want = Math.max(-65504, Math.min(65504, expected[index] as number));
        const unit = Math.max(2 ** -24, 2 ** (Math.floor(Math.log2(Math.abs(want))) - 10));
        expect(Math.abs((actual[index] as number) - want), `hidden ${hidden}, ${index}`).toBeLessThanOrEqual(
          0.502 * unit,
        );
      }
      expect(actual.slice((rows - 1) * hidden).every(Number.isNaN)).toBe(true);
    }
  });

  test.each(["loops", "registers"] as const)("%s: a row of zeros stays zero", async (variant) => {
    const values = await runNorm({ input: new Float32Array(64), weight: random.normals(64), count: 1, variant });
    expect(values.every((value) => value === 0)).toBe(true);
  });

  test("refuses sizes that are no whole vec4s, and bad epsilons", async () => {
    await expect(createRmsNorm(gpu, { hidden: 6, epsilon: 1e-5 })).rejects.toThrow(/multiple of 4/);
    await expect(createRmsNorm(gpu, { hidden: 8, epsilon: 0 })).rejects.toThrow(/epsilon 0/);
  });
});
