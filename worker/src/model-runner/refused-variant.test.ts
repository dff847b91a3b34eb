import { createKernel, type Gpu, type KernelCheck, openGpu, selfTest } from "@kivimesh/kernels";
import { afterAll, beforeAll, expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { GREEDY, pages, promptTokens } from "./testing/sequences.ts";

/** A check whose kernel the driver refuses. */
const BROKEN: KernelCheck = {
  variant: "subgroups",
  feature: "subgroups",
  async run(gpu) {
    await createKernel(gpu, { label: "broken", code: "@compute fn main() { nonsense }", bindings: [] });
    return undefined;
  },
};

let gpu: Gpu;
beforeAll(async () => {
  gpu = await openGpu();
});
afterAll(() => gpu.close());

async function firstToken(on: Gpu) {
  const runner = await openModelRunner({ model: dummyModel("tiny-llama"), gpu: on, maxSequences: 1 });
  try {
    const tokens = promptTokens(20, runner.limits.vocabulary, 1);
    const chunk = { slot: 0, tokens, position: 0, pageTable: pages(0, 1), sample: GREEDY };
    const { sampled } = await runner.step({ prefill: [chunk], decode: [] });
    return { token: sampled[0]?.token, device: runner.device };
  } finally {
    await runner.close();
  }
}

test("a runner on a device whose self-test refused a variant runs without it, says so, and still answers", async () => {
  const warnings: string[] = [];
  const derived = await selfTest(gpu, { checks: [BROKEN], warn: (message) => warnings.push(message) });
  expect(warnings).toHaveLength(1);
  const [plain, usual] = [await firstToken(derived), await firstToken(gpu)];
  expect(usual.device.features.subgroups).toBe(true);
  expect(usual.device.fallbacks).toEqual([]);
  expect(plain.device.features).toMatchObject({ subgroups: false, subgroupMatrix: false });
  expect(plain.device.fallbacks).toMatchObject([{ variant: "subgroups", reason: expect.stringMatching(/broken/) }]);
  expect(plain.token).toBe(usual.token);
});
