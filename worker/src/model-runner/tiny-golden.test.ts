import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { type DeviceProfile, type Gpu, openGpu } from "@kivimesh/kernels";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { loadModel } from "../model/load-model.ts";
import type { ModelRunner } from "./model-runner.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { decodeGreedy, pages, prefill } from "./testing/sequences.ts";

interface Golden {
  readonly prompts: readonly { ids: number[]; tokens: number[]; logits: number[] }[];
}

// K and V are rounded to f16 here and not in the reference; logits of these models span about ±15.
const LOGIT_TOLERANCE = 0.03;

// Both sets of kernels run on every driver; which one is used by default is a matter of speed.
const CASES: readonly (readonly [string, DeviceProfile])[] = [
  ["tiny-llama-gqa", "software"],
  ["tiny-llama-mha", "software"],
  ["tiny-llama-gqa", "hardware"],
];

describe.each(CASES)("%s with %s kernels against transformers", (name, profile) => {
  const folder = new URL(`../../../integration-tests/golden/${name}`, import.meta.url);
  const golden: Golden = JSON.parse(readFileSync(`${fileURLToPath(folder)}.json`, "utf8"));
  let gpu: Gpu;
  let runner: ModelRunner;

  beforeAll(async () => {
    gpu = await openGpu({ profile, unchecked: false });
    const model = await loadModel({ path: fileURLToPath(folder) });
    runner = await openModelRunner({ model, gpu, kvFormat: "f16", blockTokens: 32, residualTokens: 32 });
    model.close();
  });
  afterAll(async () => {
    await runner.close();
    await gpu.close();
  });

  test.each(golden.prompts.map(({ ids }, index) => [ids.length, index]))(
    "a prompt of %i tokens: all logits, and 32 greedy tokens",
    async (length, index) => {
      const expected = golden.prompts[index];
      if (expected === undefined) throw new Error("no such prompt");
      const table = pages(5, 16);
      const { token, logits } = await prefill(runner, Uint32Array.from(expected.ids), 1, table);
      const worst = expected.logits.reduce((most, logit, i) => Math.max(most, Math.abs(logit - (logits[i] ?? 0))), 0);
      expect(worst).toBeLessThan(LOGIT_TOLERANCE);
      const tokens = await decodeGreedy(runner, 1, table, length, token, expected.tokens.length);
      expect(tokens).toEqual(expected.tokens);
    },
  );
});
