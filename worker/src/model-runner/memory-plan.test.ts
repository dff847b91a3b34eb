import { openGpu } from "@kivimesh/kernels";
import { describe, expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import { kvGeometry } from "./kv-geometry.ts";
import { type MemoryPlanRequest, modelWeightBytes, planMemory } from "./memory-plan.ts";
import { openModelRunner } from "./open-model-runner.ts";

const GIBIBYTE = 2 ** 30;

/** A 7B model in f16 on a GPU that binds 2 GiB at once. */
function request(kvFormat: string, residualTokens: number, tokens: number, budgetGibibytes: number): MemoryPlanRequest {
  const { config } = dummyModel("llama-2-7b");
  return {
    budgetBytes: budgetGibibytes * GIBIBYTE,
    config,
    kv: kvGeometry(config, kvFormat, Math.min(128, residualTokens), residualTokens),
    weightBytes: 13_476_831_232,
    maxPrefillRows: 2048,
    maxContextTokens: 4096,
    tokensPerSequence: tokens,
    activations: "f16",
    profile: "hardware",
    device: { maxStorageBufferBindingSize: 2 ** 31 - 4, maxBufferSize: 2 ** 40 },
  };
}

describe("planMemory", () => {
  test("the parts add up and stay within the budget; one sequence more does not fit", () => {
    for (const [format, window, tokens, budget] of [
      ["kivi2", 32, 499, 80],
      ["kivi2r", 128, 4096, 24],
      ["f16", 128, 4096, 80],
      ["f16", 32, 499, 24],
    ] as const) {
      const asked = request(format, window, tokens, budget);
      const plan = planMemory(asked);
      const { total, ...parts } = plan.bytes;
      expect(total).toBe(Object.values(parts).reduce((sum, bytes) => sum + bytes, 0));
      expect(total).toBeLessThanOrEqual(asked.budgetBytes - 512 * 2 ** 20);
      expect(plan.kvBytes).toBe(plan.numPages * asked.kv.blockBytes);
      const held = Math.floor(tokens / window) * (window / asked.kv.blockTokens);
      expect(plan.numPages).toBeGreaterThanOrEqual(plan.maxSequences * held);
      expect(planMemory({ ...asked, maxSequences: plan.maxSequences + 1 })).toEqual(plan);
      const fewer = planMemory({ ...asked, maxSequences: plan.maxSequences - 1 });
      expect(fewer).toMatchObject({ maxSequences: plan.maxSequences - 1, limitedBy: "maxSequences" });
      expect(fewer.kvCapacityTokens).toBeGreaterThanOrEqual(plan.kvCapacityTokens);
    }
  });

  test("two-bit KV holds more than five times the tokens and more sequences", () => {
    const f16 = planMemory(request("f16", 32, 4608, 80));
    const kivi2 = planMemory(request("kivi2", 32, 4608, 80));
    // Both are near: the memory ends where one binding of a layer's pages ends.
    expect(f16.limitedBy).toBe("pages of one binding");
    expect(kivi2.kvCapacityTokens / f16.kvCapacityTokens).toBeGreaterThan(5);
    expect(kivi2.maxSequences / f16.maxSequences).toBeGreaterThan(4);
  });

  test("says what limits it where it is not the memory", () => {
    expect(planMemory(request("kivi2", 128, 4096, 500)).limitedBy).toBe("pages of one binding");
    const short = planMemory(request("kivi2", 128, 130, 500));
    expect(short).toMatchObject({ limitedBy: "residual of one binding", maxSequences: 1023 });
    expect(() => planMemory(request("f16", 128, 4096, 14))).toThrow(
      /hold no sequence of 4096 tokens: limited by memory/,
    );
  });

  test("agrees with what a runner takes", async () => {
    const model = dummyModel("tiny-llama-mha");
    const { config } = model;
    const gpu = await openGpu();
    const plan = planMemory({
      budgetBytes: 100 * 2 ** 20,
      config,
      kv: kvGeometry(config, "kivi2r", 32, 32),
      weightBytes: modelWeightBytes(model),
      maxPrefillRows: 512,
      maxContextTokens: 1024,
      tokensPerSequence: 1024,
      activations: "f32",
      profile: "software",
      device: { maxStorageBufferBindingSize: 2 ** 27, maxBufferSize: 2 ** 30 },
      maxSequences: 24,
      reservedBytes: 0,
    });
    expect(plan).toMatchObject({ maxSequences: 24, limitedBy: "maxSequences" });
    const sizes = { maxSequences: 24, maxPrefillRows: 512, maxContextTokens: 1024, kvBytes: plan.kvBytes };
    const runner = await openModelRunner({
      model,
      gpu,
      kvFormat: "kivi2r",
      blockTokens: 32,
      residualTokens: 32,
      ...sizes,
    });
    const { kv, activations, weights } = runner.memory();
    expect(runner.limits.numPages).toBe(plan.numPages);
    expect(kv).toBe(plan.bytes.kvPages + plan.bytes.kvResidual);
    expect(activations / plan.bytes.activations).toBeCloseTo(1, 2);
    expect(weights).toBeLessThan(1.1 * plan.bytes.weights);
    expect(plan.bytes.total).toBeLessThanOrEqual(100 * 2 ** 20);
    await runner.close();
    await gpu.close();
  });
});
