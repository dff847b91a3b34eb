import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { halfToFloat } from "./half.ts";
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

  async function run(
    gateUp: Float32Array,
    rows: number,
    width: number,
    type: "f32" | "f16" = "f32",
  ): Promise<Float32Array> {
    const kernel = await createSiluMul(gpu, { width, output: type });
    const output = createPoisoned(gpu, "output", rows * width * (type === "f16" ? 2 : 4));
    const bound = kernel.bind({ gateUp: uploadStorage(gpu, "gate up", gateUp), output: output.buffer });
    submitPass(gpu, (pass) => bound.encode(pass, rows));
    const content = await output.read();
    assertNoPoison("silu-mul", content);
    return type === "f16" ? Float32Array.from(new Uint16Array(content), halfToFloat) : new Float32Array(content);
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

  test("writes f16: rounded, clamped, NaN kept", async () => {
    const width = 4 * random.integer(2, 300);
    const gateUp = random.normals(2 * 2 * width, 3);
    gateUp.set([1e5, 1e5, Number.NaN], 0);
    gateUp.set([1e5, -1e5, 1], width);
    const actual = await run(gateUp, 2, width, "f16");
    expect(Array.from(actual.subarray(0, 3))).toEqual([65504, -65504, Number.NaN]);
    const expected = siluMulReference(gateUp, 2, width);
    for (let index = 3; index < 2 * width; index++) {
      const want = expected[index] as number;
      const unit = Math.max(2 ** -24, 2 ** (Math.floor(Math.log2(Math.abs(want))) - 10));
      expect(Math.abs((actual[index] as number) - want), `${index}`).toBeLessThanOrEqual(0.505 * unit);
    }
  });

  test("refuses a width that is no whole vec4", async () => {
    await expect(createSiluMul(gpu, { width: 10 })).rejects.toThrow(/width 10/);
  });
});
