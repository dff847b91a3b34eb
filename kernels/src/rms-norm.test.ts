import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
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

  async function runNorm(input: Float32Array, weight: Float32Array, epsilon: number, count: number, gather?: number[]) {
    const hidden = weight.length;
    const norm = await createRmsNorm(gpu, { hidden, epsilon });
    const output = createPoisoned(gpu, "output", count * hidden * 4);
    const bound = norm.bind({
      input: uploadStorage(gpu, "input", input),
      weight: uploadStorage(gpu, "weight", weight),
      output: output.buffer,
      ...(gather === undefined ? {} : { rowIndices: uploadStorage(gpu, "rows", Uint32Array.from(gather)) }),
    });
    submitPass(gpu, (pass) => bound.encode(pass, count));
    const content = await output.read();
    assertNoPoison("rms-norm", content);
    return new Float32Array(content);
  }

  test("agrees with the reference, gathered or not, at any size", async () => {
    for (const hidden of [4, 60, 64, 252, 256, 260, 576, 4 * random.integer(1, 1100)]) {
      const rows = random.integer(1, 9);
      const size = random.pick([1, 1e-4, 1e4]);
      const input = random.normals(rows * hidden, size);
      const weight = random.normals(hidden, 1, 1);
      const epsilon = random.pick([1e-5, 1e-6]);
      const inOrder = Array.from({ length: rows }, (_, row) => row);
      const gather = Array.from({ length: random.integer(1, 12) }, () => random.integer(0, rows - 1));
      const tolerance = { nmse: 1e-12, maxAbs: 5e-5 };
      const context = `hidden ${hidden}, size ${size}`;
      const direct = await runNorm(input, weight, epsilon, rows);
      assertClose(context, direct, rmsNormReference(input, weight, inOrder, epsilon), tolerance);
      const gathered = await runNorm(input, weight, epsilon, gather.length, gather);
      assertClose(`${context} gathered`, gathered, rmsNormReference(input, weight, gather, epsilon), tolerance);
      for (const [index, row] of gather.entries()) {
        const actual = gathered.slice(index * hidden, (index + 1) * hidden);
        assertSameBits(context, actual, direct.slice(row * hidden, (row + 1) * hidden));
      }
    }
  });

  test("a row of zeros stays zero", async () => {
    const values = await runNorm(new Float32Array(64), random.normals(64), 1e-5, 1);
    expect(values.every((value) => value === 0)).toBe(true);
  });

  test("refuses sizes that are no whole vec4s, and bad epsilons", async () => {
    await expect(createRmsNorm(gpu, { hidden: 6, epsilon: 1e-5 })).rejects.toThrow(/multiple of 4/);
    await expect(createRmsNorm(gpu, { hidden: 8, epsilon: 0 })).rejects.toThrow(/epsilon 0/);
  });
});
