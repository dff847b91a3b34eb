import { readFileSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { loadModel } from "../model/load-model.ts";
import { smollm2Path } from "../model/testing/smollm2.ts";
import type { ModelRunner } from "./model-runner.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { GREEDY, pages, prefill } from "./testing/sequences.ts";

interface Prompt {
  readonly name: string;
  readonly ids: readonly number[];
  readonly tokens: readonly number[];
  readonly logprobs: readonly number[];
  /** Distance of the two best logits at every step of the reference. */
  readonly margins: readonly number[];
  readonly top5: readonly { id: number; logit: number }[];
}

const golden: { prompts: readonly Prompt[] } = JSON.parse(
  readFileSync(new URL("../../../integration-tests/golden/smollm2.json", import.meta.url), "utf8"),
);

// K and V are rounded to f16 here and not in the reference, which runs in f32 throughout.
const LOGIT_TOLERANCE = 0.05;
const PREFILL_ROWS = 256;

let runner: ModelRunner;
beforeAll(async () => {
  const model = await loadModel({ path: smollm2Path() });
  runner = await openModelRunner({
    model,
    kvFormat: "f16",
    maxSequences: 2,
    maxContextTokens: 1024,
    maxPrefillRows: PREFILL_ROWS,
  });
  model.close();
}, 300_000);
afterAll(() => runner.close());

/** The best logits must be the reference's; order is checked as far as their distances exceed the tolerance. */
function expectTop5(logits: Float32Array, top5: Prompt["top5"]): void {
  for (const { id, logit } of top5) expect(Math.abs((logits[id] as number) - logit)).toBeLessThan(LOGIT_TOLERANCE);
  const named = new Set(top5.map(({ id }) => id));
  const fifth = top5[4]?.logit ?? Number.NaN;
  const better = [...logits.keys()].filter((id) => !named.has(id) && (logits[id] as number) > fifth + LOGIT_TOLERANCE);
  expect(better).toEqual([]);
}

test.each(golden.prompts.map((prompt) => [prompt.name, prompt.ids.length, prompt] as const))(
  "%s (%i tokens): top-5 logits and greedy tokens equal those of transformers",
  async (_name, length, prompt) => {
    const table = pages(0, 8);
    const cuts = length > PREFILL_ROWS ? [PREFILL_ROWS] : [];
    const first = await prefill(runner, Uint32Array.from(prompt.ids), 0, table, cuts);
    expectTop5(first.logits, prompt.top5);
    const chosen = [first.token];
    const logprobs = [prompt.logprobs[0] as number];
    // The reference's tokens are fed back, so that every step is compared, also those after an undecided one.
    for (const [index, token] of prompt.tokens.slice(0, -1).entries()) {
      const row = { slot: 0, token, position: length + index, pageTable: table, sample: GREEDY };
      const { sampled } = await runner.step({ prefill: [], decode: [row] });
      chosen.push(sampled[0]?.token ?? -1);
      logprobs.push(sampled[0]?.logprob ?? Number.NaN);
    }
    const clear = [...prompt.margins.keys()].filter((step) => (prompt.margins[step] as number) > LOGIT_TOLERANCE);
    expect(clear.length).toBeGreaterThan(25);
    expect(clear.map((step) => chosen[step])).toEqual(clear.map((step) => prompt.tokens[step]));
    for (const step of clear) {
      const difference = Math.abs((logprobs[step] as number) - (prompt.logprobs[step] as number));
      expect(difference).toBeLessThan(LOGIT_TOLERANCE);
    }
  },
);
