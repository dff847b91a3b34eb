/**
 * Where a step's time goes. Run by hand:
 *
 *     npx tsx --conditions=source worker/src/model-runner/bench/step-profile.ts [KV_FORMAT] [CONTEXT] [DUMMY_ARCHITECTURE]
 *
 * Prints JSON lines: speed of prefill and of decode (1 and 8 sequences; step by step, and several steps a submit with the
 * next submit encoded ahead) with the milliseconds of a step on the host, on the GPU and in all, then GPU milliseconds and
 * dispatches by kernel.
 */
import { openGpu } from "@kivimesh/kernels";
import { loadModel } from "../../model/load-model.ts";
import { smollm2Path } from "../../model/testing/smollm2.ts";
import type { DecodeRow, StepResult } from "../model-runner.ts";
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

async function prefillAll(slot: number): Promise<StepResult[]> {
  const pageTable = pages(slot * pagesEach, pagesEach);
  const results: StepResult[] = [];
  for (let position = 0; position < context; position += 256) {
    const chunk = tokens.slice(position, position + 256);
    const prefill = [{ slot, tokens: chunk, position, pageTable, sample: GREEDY }];
    results.push(await runner.step({ prefill, decode: [] }));
  }
  return results;
}

function decode(batch: number, step: number, decodeSteps = 1): Promise<StepResult> {
  const rows = Array.from({ length: batch }, (_, slot): DecodeRow => {
    const pageTable = pages(slot * pagesEach, pagesEach);
    return { slot, token: slot + step, position: context + step, pageTable, sample: GREEDY };
  });
  return runner.step({ prefill: [], decode: rows, decodeSteps });
}

/** Each step waits for the one before it. */
async function decodeSingly(batch: number): Promise<StepResult[]> {
  const results: StepResult[] = [];
  for (let step = 0; step < DECODE_STEPS; step++) results.push(await decode(batch, step));
  return results;
}

/** Submits of `steps` steps, one encoded while another runs. */
async function decodeAhead(batch: number, steps: number): Promise<StepResult[]> {
  const results: StepResult[] = [];
  const underWay: Promise<StepResult>[] = [];
  for (let step = 0; step < DECODE_STEPS; step += steps) {
    underWay.push(decode(batch, step, steps));
    if (underWay.length === 2) results.push((await underWay.shift()) as StepResult);
  }
  return [...results, ...(await Promise.all(underWay))];
}

/** Tokens a second of wall time, and of CPU time spread over two cores: the latter tells what a loaded machine hides. */
async function timed(label: string, count: number, work: () => Promise<StepResult[]>): Promise<void> {
  const cpu = process.cpuUsage();
  const start = performance.now();
  const results = await work();
  const seconds = (performance.now() - start) / 1000;
  const used = process.cpuUsage(cpu);
  const busy = (used.user + used.system) / 1e6;
  const sum = (of: (result: StepResult) => number) => results.reduce((total, result) => total + of(result), 0);
  const line = {
    label,
    tokensPerSecond: count / seconds,
    perTwoCpuSeconds: (2 * count) / busy,
    busyCores: busy / seconds,
    milliseconds: {
      encode: 1000 * sum((result) => result.seconds.encode),
      gpu: 1000 * sum((result) => result.seconds.gpu ?? 0),
      wall: 1000 * seconds,
    },
  };
  console.log(JSON.stringify(line));
}

console.log(
  JSON.stringify({ device: gpu.name, profile: gpu.profile, model: model.name, kvFormat, context, openSeconds }),
);
for (let slot = 1; slot < BATCH; slot++) await prefillAll(slot);
await timed("prefill", context, () => prefillAll(0));
for (const batch of [1, BATCH]) {
  await timed(`decode x${batch}, ${DECODE_STEPS} steps`, batch * DECODE_STEPS, () => decodeSingly(batch));
  const ahead = `decode x${batch}, ${DECODE_STEPS} steps, 8 a submit, ahead`;
  await timed(ahead, batch * DECODE_STEPS, () => decodeAhead(batch, 8));
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
  const all = times.reduce((sum, { dispatches }) => sum + dispatches, 0);
  console.log(JSON.stringify({ phase, totalMilliseconds: total, dispatchesPerLayer: all / model.config.layers }));
  for (const { label, dispatches, milliseconds } of times.slice(0, 14)) {
    console.log(JSON.stringify({ phase, label, dispatches, milliseconds, share: milliseconds / total }));
  }
}
profiler.stop();
await runner.close();
model.close();
await gpu.close();
