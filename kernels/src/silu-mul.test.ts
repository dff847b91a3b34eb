import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { createSiluMul, siluMulReference } from "./silu-mul.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";

describe("silu-mul", () => {
  let gpu: Gpu;
  const random = seededRandom("silu-mul");
  beforeAll(async () => {
    gpu = await openGpu({ unchecked: false });
  });
  afterAll(() => gpu.close());

  async function run(gateUp: Float32Array, rows: number, width: number): Promise<Float32Array> {
    const kernel = await createSiluMul(gpu, { width });
    const output = createPoisoned(gpu, "output", rows * width * 4);
    const bound = kernel.bind({ gateUp: uploadStorage(gpu, "gate up", gateUp), output: output.buffer });
    submitPass(gpu, (pass) => bound.encode(pass, rows));
    const content = await output.read();
    assertNoPoison("silu-mul", content);
    return new Float32Array(content);
  }

  test("agrees with the reference at any width; a row does not depend on the others", async () => {
    for (const width of [4, 252, 256, 260, 4 * random.integer(1, 500)]) {
      const rows = random.integer(2, 9);
      const gateUp = random.normals(rows * 2 * width, 3);
      const actual = await run(gateUp, rows, width);
      assertClose(`width ${width}`, actual, siluMulReference(gateUp, rows, width), { nmse: 1e-12, maxAbs: 1e-4 });
      const last = await run(gateUp.slice((rows - 1) * 2 * width), 1, width);
      assertSameBits(`width ${width}`, last, actual.slice((rows - 1) * width));
    }
  });

  test("stays finite at the ends of the sigmoid", async () => {
    const gateUp = new Float32Array([-65504, -100, -88, -20, 65504, 100, 20, 0, 1, 1, 1, 1, 1, 1, 1, 1]);
    const actual = await run(gateUp, 1, 8);
    assertClose("ends", actual, siluMulReference(gateUp, 1, 8), { nmse: 1e-12, maxAbs: 1e-6 * 65504 });
    expect(actual.every(Number.isFinite)).toBe(true);
  });

  test("refuses a width that is no whole vec4", async () => {
    await expect(createSiluMul(gpu, { width: 10 })).rejects.toThrow(/width 10/);
  });
});
