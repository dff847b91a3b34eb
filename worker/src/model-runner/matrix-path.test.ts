/** The path of devices with subgroup matrices (f16 activations, gated epilogue), its products written out. */
import { type Gpu, openGpu } from "@kivimesh/kernels";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import type { DecodeRow, ModelRunner, StepResult } from "./model-runner.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { chunkOf, GREEDY, pages, prefill, promptTokens } from "./testing/sequences.ts";

const WINDOW = 32;
const VOCABULARY = 320;
const LENGTH = 75;

function logitsOf(result: StepResult, slot: number): Float32Array {
  const row = result.sampled.find((sampled) => sampled.slot === slot);
  if (row?.logits === undefined) throw new Error(`slot ${slot} has no logits`);
  return row.logits;
}

/** Normalized mean squared error. */
function errorOf(actual: Float32Array, expected: Float32Array): number {
  let error = 0;
  let power = 0;
  expected.forEach((value, index) => {
    error += ((actual[index] as number) - value) ** 2;
    power += value ** 2;
  });
  return error / power;
}

/** Architecture, format, and the error allowed: a code on the edge goes either way when activations are rounded. */
const CASES = [
  ["tiny-llama", "kivi2r", 5e-2],
  ["tiny-llama-mha", "f16", 1e-4],
] as const;

describe.each(CASES)("%s, %s", (architecture, kvFormat, allowed) => {
  let gpu: Gpu;
  let matrices: ModelRunner;
  let plain: ModelRunner;
  const tokens = promptTokens(LENGTH, VOCABULARY, 1);
  const table = pages(0, 4);

  beforeAll(async () => {
    gpu = await openGpu({ profile: "hardware", unchecked: false });
    const kv = { kvFormat, blockTokens: WINDOW, residualTokens: WINDOW, maxContextTokens: 256, maxPrefillRows: 192 };
    const common = { model: dummyModel(architecture), gpu, ...kv };
    matrices = await openModelRunner({ ...common, emulatedMatrices: true });
    plain = await openModelRunner(common);
  });
  afterAll(async () => {
    await matrices.close();
    await plain.close();
    await gpu.close();
  });

  test("answers as the f32 path does, up to the rounding of activations", async () => {
    // Less than f32 needs: gate and up are never written.
    expect(matrices.memory().activations).toBeLessThan(0.8 * plain.memory().activations);
    const [actual, expected] = [await prefill(matrices, tokens, 0, table), await prefill(plain, tokens, 0, table)];
    expect(errorOf(actual.logits, expected.logits)).toBeLessThan(allowed);
    expect(errorOf(actual.logits, expected.logits)).toBeGreaterThan(0);
    // Across the end of a window, so that decode seals one and then reads it.
    for (let position = LENGTH; position < LENGTH + 24; position++) {
      const row = { slot: 0, token: (position * 7) % VOCABULARY, position, pageTable: table, sample: GREEDY };
      const plan = { prefill: [], decode: [{ ...row, returnLogits: true }] };
      const [got, right] = [await matrices.step(plan), await plain.step(plan)];
      expect(got.nonFiniteSlots).toEqual([]);
      expect(errorOf(logitsOf(got, 0), logitsOf(right, 0))).toBeLessThan(allowed);
    }
  });

  test("a row's bits depend on its own sequence only", async () => {
    const alone = await prefill(matrices, tokens, 0, table);
    const others = [33, 64].map((length, index) => {
      return chunkOf(promptTokens(length, VOCABULARY, 5 + index), 0, length, 4 + index, pages(10 + 4 * index, 4));
    });
    const chunk = chunkOf(tokens, 0, LENGTH, 1, pages(4, 4));
    const among = await matrices.step({
      prefill: [others[0], chunk, others[1]].flatMap((one) => one ?? []),
      decode: [],
    });
    expect(logitsOf(among, 1)).toEqual(alone.logits);
    const row: DecodeRow = { slot: 1, token: alone.token, position: LENGTH, pageTable: pages(4, 4), sample: GREEDY };
    const single = await matrices.step({ prefill: [], decode: [{ ...row, returnLogits: true }] });
    await matrices.step({ prefill: [chunk], decode: [] });
    const batch = [3, 4, 5, 6].map(
      (slot): DecodeRow => ({ slot, token: slot, position: slot, pageTable: [], sample: GREEDY }),
    );
    const many = await matrices.step({ prefill: [], decode: [...batch, { ...row, returnLogits: true }] });
    expect(logitsOf(many, 1)).toEqual(logitsOf(single, 1));
    expect(new Set(logitsOf(many, 1)).size).toBeGreaterThan(100);
  });

  test("several steps a submit give the tokens of single ones", async () => {
    const run = async (decodeSteps: number) => {
      const { token } = await prefill(matrices, tokens, 2, table);
      const generated = [token];
      while (generated.length < 25) {
        const position = LENGTH + generated.length - 1;
        const row = { slot: 2, position, pageTable: table, sample: GREEDY };
        const { sampled } = await matrices.step({ prefill: [], decode: [row], decodeSteps });
        generated.push(...sampled.map((one) => one.token));
      }
      return generated;
    };
    expect(await run(8)).toEqual(await run(1));
  });
});
