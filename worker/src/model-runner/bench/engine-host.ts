/**
 * What the engine costs on the host: a model runner that answers at once, so that every second is the engine's. Run by hand:
 *
 *     npx tsx --conditions=source worker/src/model-runner/bench/engine-host.ts [SEQUENCES ...]
 *
 * Prints one JSON line a number of running sequences: milliseconds of host time a decode step and a submit.
 */
import { setImmediate as turn } from "node:timers/promises";
import { Engine } from "../../engine.ts";
import { greedySampling } from "../../generation.ts";
import { dummyModel } from "../../model/dummy-model.ts";
import { kvGeometry } from "../kv-geometry.ts";
import type { ModelRunner, SampledToken, StepPlan } from "../model-runner.ts";

const PROMPT_TOKENS = 161;
const OUTPUT_TOKENS = 338;

function instantRunner(sequences: number): ModelRunner {
  const { config } = dummyModel("llama-2-7b");
  const kv = kvGeometry(config, "kivi2", 128, 128);
  const maxPagesPerSequence = Math.ceil(config.contextTokens / kv.blockTokens);
  const features = { shaderF16: true, subgroups: true, subgroupSize: 32, timestampQuery: true, subgroupMatrix: true };
  return {
    config,
    kv,
    limits: {
      numPages: sequences * 4,
      maxSequences: sequences,
      maxPrefillRows: 2048,
      maxPagesPerSequence,
      maxContextTokens: config.contextTokens,
      vocabulary: config.vocabulary,
      maxDecodeSteps: 16,
      maxStepsInFlight: 3,
    },
    device: { name: "none", profile: "hardware", features, fallbacks: [] },
    lost: new Promise(() => undefined),
    async step({ prefill, decode, decodeSteps = 1 }: StepPlan) {
      const sampled: SampledToken[] = [];
      for (const { slot, sample } of prefill) if (sample !== undefined) sampled.push({ slot, token: 5, logprob: -1 });
      for (let step = 0; step < decodeSteps; step++) {
        for (const { slot } of decode) sampled.push({ slot, token: 7, logprob: -1 });
      }
      await turn();
      return { sampled, scores: [], nonFiniteSlots: [], seconds: { encode: 0, wall: 0, gpu: 0.02 } };
    },
    readBlock: () => Promise.resolve(new Uint8Array()),
    writeBlock: () => undefined,
    memory: () => ({ weights: 0, kv: 0, activations: 0, other: 0 }),
    close: () => Promise.resolve(),
  };
}

/** @param waiting requests for each slot: those behind the first wait until one ends. */
async function measure(sequences: number, waiting: number, decodeStepsPerSubmit: number) {
  const requests = sequences * waiting;
  let ended = 0;
  let resolve: (() => void) | undefined;
  const done = new Promise<void>((settle) => {
    resolve = settle;
  });
  const engine = new Engine({
    runner: instantRunner(sequences),
    modelDigest: new Uint8Array(32),
    numerics: "invariant",
    maxPrefillRows: 2048,
    decodeStepsPerPrefill: 1,
    prefillPatience: 0,
    decodeStepsPerSubmit,
    submitLatencyMs: Number.POSITIVE_INFINITY,
    submitsInFlight: 2,
    onEvents: (events) => {
      for (const { type } of events) if (type === "finished") ended += 1;
      if (ended === requests) resolve?.();
    },
  });
  const started = performance.now();
  for (let request = 0; request < requests; request++) {
    engine.submit({
      requestId: `r${request}`,
      epoch: 0,
      tokens: Uint32Array.from({ length: PROMPT_TOKENS }, (_, index) => (request * 7919 + index) % 30_000),
      promptTokens: PROMPT_TOKENS,
      maxTokens: OUTPUT_TOKENS,
      sampling: greedySampling,
      stopTokenIds: [2],
      tenantNamespace: new Uint8Array(32),
      deadlineUnixMs: 0,
      returnFirstLogits: false,
    });
  }
  await done;
  const seconds = (performance.now() - started) / 1000;
  const { steps, submits, decodeTokens, submitSeconds } = engine.stats();
  const { host } = submitSeconds;
  await engine.close();
  const perStep = { hostMs: (1000 * host) / steps, wallMs: (1000 * seconds) / steps };
  const perSubmit = { hostMs: (1000 * host) / submits };
  return { sequences, requests, decodeStepsPerSubmit, steps, submits, rows: decodeTokens / steps, perStep, perSubmit };
}

const sizes = process.argv.length > 2 ? process.argv.slice(2).map(Number) : [256, 1000];
await measure(64, 1, 8);
for (const sequences of sizes) {
  for (const [waiting, steps] of [
    [1, 1],
    [1, 8],
    [2, 1],
  ] as const) {
    console.log(JSON.stringify(await measure(sequences, waiting, steps)));
  }
}
process.exit(0);
