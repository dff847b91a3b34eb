/**
 * Where a step's time goes. Run by hand:
 *
 *     npx tsx --conditions=source worker/src/model-runner/bench/step-profile.ts [KV_FORMAT] [CONTEXT] [DUMMY_ARCHITECTURE]
 *
 * Prints JSON lines: speed of prefill and of decode (1 and 8 sequences), then GPU milliseconds by kernel.
 */
import { openGpu } from "@kivimesh/kernels";
import { loadModel } from "../../model/load-model.ts";
import { smollm2Path } from "../../model/testing/smollm2.ts";
import type { DecodeRow } from "../model-runner.ts";
import { openModelRunner } from "../open-model-runner.ts";
import { GREEDY, pages, promptTokens } from "../testing/sequences.ts";
import { profileDispatches } from "./dispatch-profiler.ts";

const BATCH = 8;
const DECODE_STEPS = 24;

const [kvFormat = "kivi2r", contextText = "256", dummy] = process.argv.slice(2);
const context = Number(contextText);
const model = await loadModel(dummy === undefined ? { path: smollm2Path() } : { dummy });
const gpu = await openGpu();
const opened = performance.now();
const runner = await openModelRunner({ model, gpu, kvFormat, maxSequences: BATCH, maxPrefillRows: 256 });
const openSeconds = (performance.now() - opened) / 1000;
const tokens = promptTokens(context, model.config.vocabulary, 1);
const pagesEach = Math.ceil((context + 4 * DECODE_STEPS) / runner.kv.blockTokens);

async function prefillAll(slot: number): Promise<void> {
  const pageTable = pages(slot * pagesEach, pagesEach);
  for (let position = 0; position < context; position += 256) {
    const chunk = tokens.slice(position, position + 256);
    await runner.step({ prefill: [{ slot, tokens: chunk, position, pageTable, sample: GREEDY }], decode: [] });
  }
}

async function decode(batch: number, step: number): Promise<number> {
  const rows = Array.from({ length: batch }, (_, slot): DecodeRow => {
    const pageTable = pages(slot * pagesEach, pagesEach);
    return { slot, token: slot + step, position: context + step, pageTable, sample: GREEDY };
  });
  return (await runner.step({ prefill: [], decode: rows })).seconds.encode;
}

/** Tokens a second of wall time, and of CPU time spread over two cores: the latter tells what a loaded machine hides. */
async function timed(label: string, count: number, work: () => Promise<void>): Promise<void> {
  const cpu = process.cpuUsage();
  const start = performance.now();
  await work();
  const seconds = (performance.now() - start) / 1000;
  const used = process.cpuUsage(cpu);
  const busy = (used.user + used.system) / 1e6;
  const line = {
    label,
    tokensPerSecond: count / seconds,
    perTwoCpuSeconds: (2 * count) / busy,
    busyCores: busy / seconds,
  };
  console.log(JSON.stringify(line));
}

console.log(
  JSON.stringify({ device: gpu.name, profile: gpu.profile, model: model.name, kvFormat, context, openSeconds }),
);
for (let slot = 1; slot < BATCH; slot++) await prefillAll(slot);
await timed("prefill", context, () => prefillAll(0));
for (const batch of [1, BATCH]) {
  await timed(`decode x${batch}`, batch * DECODE_STEPS, async () => {
    for (let step = 0; step < DECODE_STEPS; step++) await decode(batch, step);
  });
}
const profiler = profileDispatches(gpu.device);
for (const [phase, work] of [
  ["prefill", () => prefillAll(0)],
  ["decode x1", () => decode(1, DECODE_STEPS)],
  [`decode x${BATCH}`, () => decode(BATCH, DECODE_STEPS)],
] as const) {
  await work();
  await profiler.take();
  await work();
  const times = await profiler.take();
  const total = times.reduce((sum, { milliseconds }) => sum + milliseconds, 0);
  console.log(JSON.stringify({ phase, totalMilliseconds: total }));
  for (const { label, dispatches, milliseconds } of times.slice(0, 14)) {
    console.log(JSON.stringify({ phase, label, dispatches, milliseconds, share: milliseconds / total }));
  }
}
await runner.close();
model.close();
await gpu.close();
