import { type Gpu, openGpu } from "@kivimesh/kernels";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import type { DecodeRow, ModelRunner, SamplingParameters, StepPlan } from "./model-runner.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { pages, promptTokens } from "./testing/sequences.ts";

const WINDOW = 32;
const VOCABULARY = 320;
/** Tokens after the prompt: more than a window, so that every sequence seals at least once while it decodes. */
const GENERATED = 41;

/** Prompts that end inside a window, at its end, and one before it; each drawn with another temperature and seed. */
const PROMPTS = [45, 64, 63, 7].map((length, index) => ({
  slot: [3, 0, 5, 6][index] as number,
  tokens: promptTokens(length, VOCABULARY, 50 + index),
  pageTable: pages(index * 4, 4),
  sample: { temperature: index / 2, topK: 40, topP: 0.95, seed: 0x1_0000_0001n * BigInt(index + 1) },
}));

interface Generated {
  readonly tokens: number[];
  readonly logprobs: number[];
}

function prefillPlan(): StepPlan {
  const prefill = PROMPTS.map(({ slot, tokens, pageTable, sample }) => ({
    slot,
    tokens,
    position: 0,
    pageTable,
    sample: sample as SamplingParameters,
  }));
  return { prefill, decode: [] };
}

/** Decode rows of all prompts after `done` generated tokens; without `known`, the tokens are those on the GPU. */
function rows(done: number, known?: readonly Generated[]): DecodeRow[] {
  return PROMPTS.map(({ slot, tokens, pageTable, sample }, index): DecodeRow => {
    const token = known?.[index]?.tokens[done - 1];
    return { slot, position: tokens.length + done - 1, pageTable, sample, ...(token === undefined ? {} : { token }) };
  });
}

describe.each(["software", "hardware"] as const)("decode on %s kernels", (profile) => {
  let gpu: Gpu;
  let runner: ModelRunner;
  beforeAll(async () => {
    gpu = await openGpu({ profile, unchecked: false });
    const kv = { kvFormat: "kivi2r", blockTokens: WINDOW, residualTokens: WINDOW, maxContextTokens: 128 };
    runner = await openModelRunner({ model: dummyModel("tiny-llama"), gpu, ...kv, maxPrefillRows: 256 });
  });
  afterAll(async () => {
    await runner.close();
    await gpu.close();
  });

  /** One step at a time, each token handed back by the host. */
  async function stepwise(): Promise<Generated[]> {
    const generated = PROMPTS.map((): Generated => ({ tokens: [], logprobs: [] }));
    const take = (sampled: readonly { slot: number; token: number; logprob: number }[]) => {
      for (const { slot, token, logprob } of sampled) {
        const one = generated[PROMPTS.findIndex((prompt) => prompt.slot === slot)] as Generated;
        one.tokens.push(token);
        one.logprobs.push(logprob);
      }
    };
    take((await runner.step(prefillPlan())).sampled);
    for (let done = 1; done < GENERATED; done++) {
      take((await runner.step({ prefill: [], decode: rows(done, generated) })).sampled);
    }
    return generated;
  }

  /** Blocks of `steps` steps, each started before the one before it is read. */
  async function ahead(steps: number): Promise<Generated[]> {
    const generated = PROMPTS.map((): Generated => ({ tokens: [], logprobs: [] }));
    const underWay = [runner.step(prefillPlan())];
    for (let done = 1; done < GENERATED || underWay.length > 0; ) {
      if (done < GENERATED && underWay.length < runner.limits.maxStepsInFlight) {
        const decodeSteps = Math.min(steps, GENERATED - done);
        underWay.push(runner.step({ prefill: [], decode: rows(done), decodeSteps }));
        done += decodeSteps;
        continue;
      }
      const result = await underWay.shift();
      expect(result?.nonFiniteSlots).toEqual([]);
      for (const { slot, token, logprob } of result?.sampled ?? []) {
        const one = generated[PROMPTS.findIndex((prompt) => prompt.slot === slot)] as Generated;
        one.tokens.push(token);
        one.logprobs.push(logprob);
      }
    }
    return generated;
  }

  test("however many steps a submit has, tokens, their probabilities and the sealed blocks are the same", async () => {
    const expected = await stepwise();
    const sealed = async () => {
      const table = PROMPTS.flatMap(({ pageTable, tokens }) =>
        pageTable.slice(0, Math.floor((tokens.length + GENERATED - 1) / WINDOW)),
      );
      return Promise.all(table.map((page) => runner.readBlock(page)));
    };
    const blocks = await sealed();
    expect(blocks).toHaveLength(2 + 3 + 3 + 1);
    for (const { tokens } of expected) expect(new Set(tokens).size).toBeGreaterThan(3);
    for (const steps of [1, 4, 8, 16]) {
      for (const page of pages(0, 16)) runner.writeBlock(page, new Uint8Array(runner.kv.blockBytes));
      expect(await ahead(steps)).toEqual(expected);
      expect(await sealed()).toEqual(blocks);
    }
  });

  test("a step's time on the GPU is part of its time", async () => {
    const { seconds } = await runner.step(prefillPlan());
    if (gpu.features.timestampQuery) expect(seconds.gpu).toBeGreaterThan(0);
    else expect(seconds.gpu).toBeUndefined();
    expect(seconds.gpu ?? 0).toBeLessThan(seconds.wall);
    expect(seconds.encode).toBeLessThan(seconds.wall);
  });

  test("refuses steps beyond the limit, beyond the context, and logits of more than one", async () => {
    const row = { slot: 0, position: 10, pageTable: [], sample: PROMPTS[0]?.sample as SamplingParameters };
    const plan = (decodeSteps: number, change: Partial<DecodeRow> = {}): StepPlan => {
      return { prefill: [], decode: [{ ...row, ...change }], decodeSteps };
    };
    await expect(runner.step(plan(17))).rejects.toThrow(/17 decode steps, must be 1 to 16/);
    await expect(runner.step(plan(0))).rejects.toThrow(/0 decode steps/);
    await expect(runner.step(plan(8, { position: 121, pageTable: pages(0, 4) }))).rejects.toThrow(
      /context ends at 127/,
    );
    await expect(runner.step(plan(8, { position: 24 }))).rejects.toThrow(/0 pages for 32 sealed/);
    await expect(runner.step(plan(2, { returnLogits: true }))).rejects.toThrow(/logits of 2 steps/);
  });
});
