import { afterAll, beforeAll, expect, test } from "vitest";
import { readBuffer } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { createLinearWeight } from "./linear-weight.ts";
import { copyLinearWeight } from "./linear-weight-copy.ts";
import { randomGgml } from "./testing/ggml-blocks.ts";
import { seededRandom } from "./testing/random.ts";

const random = seededRandom("linear-weight-copy");
let gpu: Gpu;

beforeAll(async () => {
  gpu = await openGpu();
});
afterAll(() => gpu.close());

test.each(["F16", "Q4_1"] as const)("a copy of %s weights outlives the original", async (type) => {
  const [rows, columns] = [48, 64];
  const parts = [{ type, rows, data: randomGgml(random, type, rows * columns) }];
  const original = createLinearWeight(gpu, { label: "original", parts, columns });
  const wanted = [await readBuffer(gpu, original.codes), await readBuffer(gpu, original.scales)];
  const copy = copyLinearWeight(gpu, original, "copy");
  original.destroy();
  expect([await readBuffer(gpu, copy.codes), await readBuffer(gpu, copy.scales)]).toEqual(wanted);
  expect(copy).toMatchObject({ label: "copy", rows, columns, format: original.format, bytes: original.bytes });
  copy.destroy();
});
