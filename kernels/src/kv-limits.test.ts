/** Every KV kernel builds on a device that offers no more than the least of the drivers served. */
import { afterAll, beforeAll, expect, test } from "vitest";
import { type Gpu, openGpu, PORTABLE_LIMITS } from "./device.ts";
import { createKernel } from "./kernel.ts";
import { KV_FORMAT_NAMES, kvFormat } from "./kv-format.ts";
import { createKvKernels } from "./kv-kernels.ts";
import { buildRopeTable } from "./rope-table.ts";

let gpu: Gpu;
beforeAll(async () => {
  gpu = await openGpu({ limits: PORTABLE_LIMITS });
});
afterAll(() => gpu.close());

test("the device offers no more than was asked for, so this check can fail", async () => {
  expect(gpu.device.limits.maxComputeInvocationsPerWorkgroup).toBe(256);
  const wide = createKernel(gpu, { label: "wide", bindings: [], code: "@compute @workgroup_size(512) fn main() {}" });
  await expect(wide).rejects.toThrow(/512/);
});

const SHAPES = [
  { headDim: 64, kvHeads: 3, heads: 9 },
  { headDim: 128, kvHeads: 8, heads: 32 },
  { headDim: 128, kvHeads: 1, heads: 16 },
  { headDim: 64, kvHeads: 1, heads: 71 },
];

test.each(KV_FORMAT_NAMES.flatMap((name) => SHAPES.map((shape) => ({ name, ...shape }))))(
  "$name, D = $headDim, $heads/$kvHeads heads",
  async ({ name, headDim, kvHeads, heads }) => {
    const format = kvFormat(name);
    const shape = { layers: 1, kvHeads, headDim, blockTokens: 32, residualTokens: 32 };
    // Creation validates every pipeline against the device's limits. Nothing is dispatched: drivers compile only then.
    const kernels = createKvKernels(gpu, {
      ...{
        format,
        shape,
        heads,
        maxRows: 64,
        maxDecodeRows: 2,
        maxSlots: 2,
        maxPagesPerSequence: 4,
        maxPositions: 128,
      },
      ropeLayout: "half",
      ropeTable: buildRopeTable({ ropeDim: headDim, theta: 10_000, maxPositions: 128 }),
    });
    await expect(kernels).resolves.toBeDefined();
  },
);
