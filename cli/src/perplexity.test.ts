import { loadModel, type ModelRunner, openModelRunner } from "@kivimesh/worker";
import { describe, expect, it } from "vitest";
import { benchPrompt } from "./bench-engine.ts";
import { perplexity, windows } from "./perplexity.ts";

const R = 32;
const WINDOW = 70;

/** Log-probability of `next` after `prefix`, from the logits that a plain prefill samples from. */
async function logprobAfter(runner: ModelRunner, prefix: Uint32Array, next: number): Promise<number> {
  const pageTable = Array.from({ length: Math.ceil(prefix.length / R) }, (_, page) => page);
  const sample = { temperature: 0, topK: 0, topP: 1, seed: 0n };
  const chunk = { slot: 0, tokens: prefix, position: 0, pageTable, sample, returnLogits: true };
  const { sampled } = await runner.step({ prefill: [chunk], decode: [] });
  const logits = [...(sampled[0]?.logits ?? [])];
  const top = Math.max(...logits);
  const total = logits.reduce((sum, logit) => sum + Math.exp(logit - top), 0);
  return (logits[next] ?? Number.NaN) - top - Math.log(total);
}

describe("windows of a text", () => {
  it("are consecutive, whole and do not overlap", () => {
    const tokens = Uint32Array.from({ length: 11 }, (_, index) => index);
    expect(windows(tokens, 4).map((window) => [...window])).toEqual([
      [0, 1, 2, 3],
      [4, 5, 6, 7],
    ]);
    expect(windows(tokens, 12)).toEqual([]);
  });
});

describe("perplexity", () => {
  it.each(["f16", "kivi2r"])("of a text in chunks equals that of its tokens one by one, with %s", async (kvFormat) => {
    const model = await loadModel({ dummy: "tiny-llama" });
    const runner = await openModelRunner({
      ...{ model, kvFormat, blockTokens: R, residualTokens: R },
      ...{ maxPrefillRows: 2 * WINDOW, maxSequences: 1, maxContextTokens: 2 * WINDOW },
    });
    try {
      const tokens = benchPrompt(7, 2 * WINDOW + 5, runner.limits.vocabulary);
      const seen: number[] = [];
      const result = await perplexity(runner, tokens, WINDOW, (done) => seen.push(done));
      let sum = 0;
      for (const start of [0, WINDOW]) {
        for (let index = 1; index < WINDOW; index++) {
          sum += await logprobAfter(runner, tokens.slice(start, start + index), tokens[start + index] ?? 0);
        }
      }
      const count = 2 * (WINDOW - 1);
      expect(result).toMatchObject({ kvFormat, tokens: count });
      expect(result.bitsPerElement).toBeCloseTo(runner.kv.bitsPerElement, 9);
      expect(Math.log(result.perplexity)).toBeCloseTo(-sum / count, 5);
      expect(seen).toEqual([1, 2]);
    } finally {
      await runner.close();
      model.close();
    }
  });

  it("refuses a text without one whole window", async () => {
    await expect(perplexity({} as ModelRunner, new Uint32Array(9), 10)).rejects.toMatchObject({
      code: "INVALID_ARGUMENT",
      message: "the text has 9 tokens, less than one window of 10",
    });
  });
});
