import { type Gpu, openGpu } from "@kivimesh/kernels";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import type { LoadedModel } from "../model/loaded-model.ts";
import type { ModelRunner, StepPlan } from "./model-runner.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { logSoftmaxAt } from "./prompt-scoring.ts";
import { chunkOf, GREEDY, pages, prefill, promptTokens } from "./testing/sequences.ts";

const VOCABULARY = 320;
const KV = { kvFormat: "kivi2r", blockTokens: 32, residualTokens: 32, maxContextTokens: 256 };

let gpu: Gpu;
let runner: ModelRunner;
beforeAll(async () => {
  gpu = await openGpu();
  runner = await openModelRunner({ model: dummyModel("tiny-llama"), gpu, ...KV, maxPrefillRows: 200 });
});
afterAll(async () => {
  await runner.close();
  await gpu.close();
});

test("limits and memory follow from the options", () => {
  expect(runner.limits).toMatchObject({ maxSequences: 8, maxPrefillRows: 200, maxContextTokens: 256, numPages: 64 });
  expect(runner.kv).toMatchObject({ layers: 2, kvHeads: 2, headDim: 32, f16BytesPerToken: 512 });
  expect(runner.kv.blockBytes).toBe((runner.kv.bitsPerElement / 16) * 32 * runner.kv.f16BytesPerToken);
  const { weights, kv, activations, other } = runner.memory();
  // 84 k parameters in f32; pages, and the residual windows of 8 slots in f16.
  expect(weights).toBeGreaterThan(4 * 84_000);
  expect(kv).toBe(64 * runner.kv.blockBytes + 8 * 32 * 512);
  expect(activations).toBeGreaterThan(0);
  expect(other).toBeGreaterThan(0);
});

test("scores are the log-probabilities of the targets, whatever the chunks", async () => {
  const tokens = promptTokens(100, VOCABULARY, 3);
  const targets = promptTokens(100, VOCABULARY, 4);
  const table = pages(0, 4);
  const whole = await runner.step({
    prefill: [{ slot: 0, tokens, position: 0, pageTable: table, score: targets }],
    decode: [],
  });
  const logprobs = whole.scores[0]?.logprobs ?? new Float32Array();
  for (const row of [0, 31, 32, 63, 99]) {
    const { logits } = await prefill(runner, tokens.slice(0, row + 1), 1, pages(8, 4));
    expect(logprobs[row]).toBe(Math.fround(logSoftmaxAt(logits, targets[row] as number)));
  }
  // The second chunk of a step is scored at its own rows.
  const pair = await runner.step({
    prefill: [
      { slot: 1, tokens: tokens.slice(0, 40), position: 0, pageTable: pages(8, 4) },
      { slot: 0, tokens: tokens.slice(64), position: 64, pageTable: table, score: targets.slice(64) },
    ],
    decode: [],
  });
  expect(pair.scores).toEqual([{ slot: 0, logprobs: logprobs.slice(64) }]);
});

test("the sampled token's logprob belongs to the returned logits", async () => {
  const tokens = promptTokens(20, VOCABULARY, 5);
  const chunk = chunkOf(tokens, 0, 20, 0, []);
  const { sampled } = await runner.step({ prefill: [chunk], decode: [] });
  const { token = -1, logprob = 1, logits = new Float32Array() } = sampled[0] ?? {};
  expect(token).toBe(logits.indexOf(Math.max(...logits)));
  expect(logprob).toBeCloseTo(logSoftmaxAt(logits, token), 4);
});

test("a seed fixes the random stream, whichever slot and step it runs in", async () => {
  const tokens = promptTokens(20, VOCABULARY, 6);
  const sample = { temperature: 1, topK: 0, topP: 1, seed: 0x1234_5678_9abc_def0n };
  const draw = async (slot: number, seed: bigint) => {
    const prompt = { ...chunkOf(tokens, 0, 20, slot, []), sample: { ...sample, seed } };
    const { sampled } = await runner.step({ prefill: [prompt], decode: [] });
    const drawn = sampled.map(({ token }) => token);
    for (let position = 20; position < 30; position++) {
      const token = drawn[drawn.length - 1] as number;
      const row = { slot, token, position, pageTable: [], sample: { ...sample, seed } };
      const result = await runner.step({ prefill: [], decode: [row] });
      drawn.push(result.sampled[0]?.token ?? -1);
    }
    return drawn;
  };
  const first = await draw(0, sample.seed);
  expect(await draw(5, sample.seed)).toEqual(first);
  expect(await draw(0, sample.seed + (1n << 40n))).not.toEqual(first);
});

test("results come in plan order: prefill chunks that sample, then decode rows", async () => {
  await prefill(runner, promptTokens(10, VOCABULARY, 7), 6, []);
  const result = await runner.step({
    prefill: [
      chunkOf(promptTokens(12, VOCABULARY, 8), 0, 12, 2, []),
      chunkOf(promptTokens(64, VOCABULARY, 9), 0, 32, 3, pages(0, 2)),
      chunkOf(promptTokens(9, VOCABULARY, 10), 0, 9, 1, []),
    ],
    decode: [{ slot: 6, token: 1, position: 10, pageTable: [], sample: GREEDY }],
  });
  expect(result.sampled.map(({ slot }) => slot)).toEqual([2, 1, 6]);
  expect(result.sampled.map(({ logits }) => logits?.length)).toEqual([VOCABULARY, VOCABULARY, undefined]);
});

describe("a plan is refused before it runs:", () => {
  const chunk = { slot: 0, tokens: new Uint32Array(10), position: 0, pageTable: [] };
  const row = { slot: 1, token: 0, position: 0, pageTable: [], sample: GREEDY };
  const cases: [string, StepPlan, RegExp][] = [
    [
      "too many rows",
      { prefill: [{ ...chunk, tokens: new Uint32Array(201) }], decode: [] },
      /201 prefill rows, at most 200/,
    ],
    ["no rows", { prefill: [{ ...chunk, tokens: new Uint32Array(0) }], decode: [] }, /empty chunk/],
    ["an unknown slot", { prefill: [], decode: [{ ...row, slot: 8 }] }, /slot 8 is not in 0..7/],
    ["a slot twice", { prefill: [{ ...chunk, slot: 1 }], decode: [row] }, /slot 1 appears twice/],
    ["a start inside a window", { prefill: [{ ...chunk, position: 16 }], decode: [] }, /multiple of 32/],
    ["too few pages", { prefill: [{ ...chunk, tokens: new Uint32Array(40) }], decode: [] }, /0 pages for 32 sealed/],
    ["a window without a page", { prefill: [], decode: [{ ...row, position: 31 }] }, /0 pages for 32 sealed/],
    ["an unknown page", { prefill: [{ ...chunk, pageTable: [64] }], decode: [] }, /page 64; the pool has 64/],
    ["a token beyond", { prefill: [], decode: [{ ...row, token: 320 }] }, /token 320; the vocabulary ends at 319/],
    [
      "a position beyond",
      { prefill: [], decode: [{ ...row, position: 256 }] },
      /position 256; the context ends at 255/,
    ],
    ["odd sampling", { prefill: [], decode: [{ ...row, sample: { ...GREEDY, topP: 0 } }] }, /topP 0/],
  ];
  test.each(cases)("%s", async (_name, plan, message) => {
    await expect(runner.step(plan)).rejects.toMatchObject({
      code: "INVALID_ARGUMENT",
      message: expect.stringMatching(message),
    });
  });
});

test("blocks and pages of the wrong size or number are refused", async () => {
  expect(() => runner.writeBlock(0, new Uint8Array(10))).toThrow(/a block has \d+ bytes, not 10/);
  expect(() => runner.writeBlock(64, new Uint8Array(runner.kv.blockBytes))).toThrow(/page 64/);
  await expect(runner.readBlock(-1)).rejects.toThrow(/page -1/);
});

test("more steps at once than the limit are refused, and any beside one that scores", async () => {
  const tokens = promptTokens(5, VOCABULARY, 1);
  const plan = { prefill: [chunkOf(tokens, 0, 5, 0, [])], decode: [] };
  const allowed = Array.from({ length: runner.limits.maxStepsInFlight }, () => runner.step(plan));
  await expect(runner.step(plan)).rejects.toMatchObject({ code: "INTERNAL" });
  const results = await Promise.all(allowed);
  for (const { sampled } of results) expect(sampled).toEqual(results[0]?.sampled);
  const scoring = runner.step({
    prefill: [{ slot: 0, tokens, position: 0, pageTable: [], score: tokens }],
    decode: [],
  });
  await expect(runner.step(plan)).rejects.toMatchObject({ code: "INTERNAL" });
  expect((await scoring).scores[0]?.logprobs).toHaveLength(5);
  await expect(runner.step(plan)).resolves.toMatchObject({ nonFiniteSlots: [] });
});

test.each([
  [{ kvFormat: "kivi3" }, /unknown KV format "kivi3"/],
  [{ residualTokens: 48 }, /not a multiple of blockTokens/],
  [{ maxPrefillRows: 16 }, /at least residualTokens = 32 rows/],
  [{ maxContextTokens: 4096 }, /maxContextTokens is 4096; it must be an integer from 1 to 2048/],
  [{ kvBytes: 100 }, /kvBytes 100 holds 0 KV blocks/],
])("opening with %o is refused", async (options, message) => {
  await expect(openModelRunner({ model: dummyModel("tiny-llama"), gpu, ...KV, ...options })).rejects.toMatchObject({
    code: "INVALID_ARGUMENT",
    message: expect.stringMatching(message),
  });
});

test("only the sequence that met a NaN is reported", async () => {
  const model = dummyModel("tiny-llama");
  const name = "token_embd.weight";
  const table = model.tensors.get(name);
  if (table === undefined) throw new Error("no embedding");
  const bytes = table.read();
  const values = new Float32Array(bytes.buffer);
  // Token 7's embedding; the head is tied, so its logit is infinite in every row: only K and V are looked at here.
  values.fill(Number.POSITIVE_INFINITY, 7 * 64, 8 * 64);
  const tensors = new Map([...model.tensors, [name, { ...table, read: () => bytes }] as const]);
  const untied: LoadedModel = {
    ...model,
    config: { ...model.config, tiedEmbedding: false },
    tensors: new Map([...tensors, ["output.weight", { ...table, name: "output.weight" }] as const]),
  };
  const spoiled = await openModelRunner({ model: untied, gpu, ...KV });
  const healthy = promptTokens(40, 7, 1);
  const sick = Uint32Array.from(healthy, (token, index) => (index === 20 ? 7 : token));
  const first = await spoiled.step({
    prefill: [chunkOf(healthy, 0, 40, 0, pages(0, 1)), chunkOf(sick, 0, 40, 1, pages(1, 1))],
    decode: [],
  });
  expect(first.nonFiniteSlots).toEqual([1]);
  // The report is not repeated for the slot's next sequence.
  const second = await spoiled.step({ prefill: [chunkOf(healthy, 0, 40, 1, pages(1, 1))], decode: [] });
  expect(second.nonFiniteSlots).toEqual([]);
  const row = { slot: 1, token: 7, position: 40, pageTable: pages(1, 1), sample: GREEDY };
  const third = await spoiled.step({ prefill: [], decode: [row] });
  expect(third.nonFiniteSlots).toEqual([1]);
  await spoiled.close();
});

test("a lost device is named, at once and from then on", async () => {
  const own = await openGpu();
  const lost = await openModelRunner({ model: dummyModel("tiny-llama"), gpu: own, ...KV });
  const plan = { prefill: [chunkOf(promptTokens(100, VOCABULARY, 1), 0, 100, 0, pages(0, 3))], decode: [] };
  const running = lost.step(plan);
  own.device.destroy();
  await expect(running).rejects.toMatchObject({ code: "DEVICE_LOST" });
  await expect(lost.lost).resolves.toMatch(/destroyed/);
  await expect(lost.step(plan)).rejects.toMatchObject({ code: "DEVICE_LOST" });
  await lost.close();
});

test("a context shorter than a residual window opens and answers", async () => {
  for (const maxContextTokens of [20, 32, 50]) {
    const short = await openModelRunner({ model: dummyModel("tiny-llama"), gpu, ...KV, maxContextTokens });
    const { logits } = await prefill(short, promptTokens(20, VOCABULARY, 5), 0, []);
    expect(logits.every(Number.isFinite)).toBe(true);
    await short.close();
  }
});
