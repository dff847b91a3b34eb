import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { linearReference } from "./linear.reference.ts";
import { createLinear, type LinearDescriptor } from "./linear.ts";
import { linearDecodeVariants } from "./linear-decode-variant.ts";
import { createLinearWeight } from "./linear-weight.ts";
import { assertClose } from "./testing/comparison.ts";
import { randomGgml } from "./testing/ggml-blocks.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";

describe("kernels of decode rows", () => {
  let gpu: Gpu;
  const random = seededRandom("linear decode variant");
  beforeAll(async () => {
    gpu = await openGpu({ profile: "hardware", unchecked: false });
  });
  afterAll(() => gpu.close());

  function descriptor(type: "F16" | "Q4_0", outputs: number, more: Partial<LinearDescriptor> = {}): LinearDescriptor {
    const columns = 64;
    const parts = [{ type, rows: outputs, data: randomGgml(random, type, outputs * columns) }];
    const weight = createLinearWeight(gpu, { label: "w", parts, columns });
    return { weight, phase: "decode", maxRows: 200, accumulate: false, input: "f16", ...more };
  }

  test.each([64, 8192])("%i outputs: every number of rows has a kernel, larger tiles for more rows", (outputs) => {
    const { variants, choose } = linearDecodeVariants(gpu, descriptor("F16", outputs));
    const chosen = [1, 16, 17, 32, 33, 64, 65, 128, 200].map(choose);
    expect(chosen).toEqual([0, 0, 1, 1, 2, 2, 3, 3, 3]);
    expect(variants).toHaveLength(4);
    for (const rows of [1, 17, 64, 200]) {
      const [x, y] = (variants[choose(rows)] as (typeof variants)[number]).grid(rows);
      expect(x * y).toBeGreaterThan(0);
    }
  });

  test("no kernel is made for more rows than can come", () => {
    expect(linearDecodeVariants(gpu, descriptor("F16", 64, { maxRows: 16 })).variants).toHaveLength(1);
    expect(linearDecodeVariants(gpu, descriptor("F16", 64, { maxRows: 17 })).variants).toHaveLength(2);
  });

  test("a kernel for many rows takes them from its first on", () => {
    const many = { rows: 150, variant: { label: "many", code: "", grid: () => [1, 1] as const } };
    const { variants, choose } = linearDecodeVariants(gpu, descriptor("F16", 64), many);
    expect(variants[choose(150)]?.label).toBe("many");
    expect(variants[choose(149)]?.label).not.toBe("many");
    const few = linearDecodeVariants(gpu, descriptor("F16", 64, { maxRows: 149 }), many);
    expect(few.variants.some(({ label }) => label === "many")).toBe(false);
  });

  test("vectors only for fast numerics, and for as many rows as they are faster", () => {
    const vectors = (type: "F16" | "Q4_0", more: Partial<LinearDescriptor>) => {
      const { variants, choose } = linearDecodeVariants(gpu, descriptor(type, 64, more));
      return [1, 2, 3].map((rows) => variants[choose(rows)]?.label.startsWith("linear vector"));
    };
    expect(vectors("F16", {})).toEqual([false, false, false]);
    expect(vectors("F16", { numerics: "fast" })).toEqual([true, false, false]);
    expect(vectors("Q4_0", { numerics: "fast" })).toEqual([true, true, false]);
  });

  test("fast numerics agree with the f64 reference", async () => {
    const columns = 96;
    const outputs = 52;
    const part = { type: "Q4_0", rows: outputs, data: randomGgml(random, "Q4_0", outputs * columns) } as const;
    const weight = createLinearWeight(gpu, { label: "w", parts: [part], columns });
    const options = { phase: "decode", maxRows: 3, accumulate: false, input: "f16", numerics: "fast" } as const;
    const linear = await createLinear(gpu, { ...options, weight, dialect: "emulated" });
    for (const rows of [1, 2, 3]) {
      const halves = Uint16Array.from(random.normals(rows * columns), floatToHalf);
      const output = createPoisoned(gpu, "output", rows * outputs * 4);
      const bound = linear.bind({ input: uploadStorage(gpu, "input", halves), output: output.buffer });
      submitPass(gpu, (pass) => bound.encode(pass, rows));
      const content = await output.read();
      assertNoPoison("fast", content);
      const expected = linearReference(Float32Array.from(halves, halfToFloat), rows, columns, [part]);
      assertClose(`${rows} rows`, new Float32Array(content), expected, { nmse: 1e-6, maxAbs: 0.05 });
    }
  });
});
