import { type Gpu, openGpu } from "@kivimesh/kernels";
import { afterAll, beforeAll, expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import type { ModelRunner } from "./model-runner.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { textPerplexity } from "./perplexity.ts";
import { logSoftmaxAt } from "./prompt-scoring.ts";
import { pages, prefill, promptTokens } from "./testing/sequences.ts";

let gpu: Gpu;
let runner: ModelRunner;
beforeAll(async () => {
  gpu = await openGpu();
  const options = {
    kvFormat: "kivi2r",
    blockTokens: 32,
    residualTokens: 32,
    maxPrefillRows: 70,
    maxContextTokens: 256,
  };
  runner = await openModelRunner({ model: dummyModel("tiny-llama"), gpu, ...options });
});
afterAll(async () => {
  await runner.close();
  await gpu.close();
});

test("is exp of the mean loss of each window's tokens after its first; the tail is dropped", async () => {
  const tokens = promptTokens(250, 320, 11);
  const progress: number[] = [];
  const result = await textPerplexity(runner, tokens, {
    contextTokens: 100,
    onProgress: (done) => progress.push(done),
  });
  expect(result.tokens).toBe(2 * 99);
  expect(progress).toEqual([64, 100, 164, 200]);
  let total = 0;
  for (const start of [0, 100]) {
    let loss = 0;
    for (let length = 1; length < 100; length++) {
      const { logits } = await prefill(
        runner,
        tokens.slice(start, start + length),
        1,
        pages(16, 3),
        length > 64 ? [64] : [],
      );
      loss -= logSoftmaxAt(logits, tokens[start + length] as number);
    }
    expect(result.windows[start / 100]).toBeCloseTo(Math.exp(loss / 99), 2);
    total += loss;
  }
  expect(result.perplexity).toBeCloseTo(Math.exp(total / 198), 2);
});

test("windows that do not fit are refused", async () => {
  const tokens = promptTokens(250, 320, 11);
  await expect(textPerplexity(runner, tokens, { contextTokens: 300 })).rejects.toThrow(
    /context of 300 tokens does not fit/,
  );
  await expect(textPerplexity(runner, tokens.slice(0, 50), { contextTokens: 100 })).rejects.toThrow(
    /50 tokens, less than one/,
  );
});
