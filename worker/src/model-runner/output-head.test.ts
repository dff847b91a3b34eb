import { createSampler, createStorage, type Gpu, openGpu, readBuffer, SAMPLE_RESULT_BYTES } from "@kivimesh/kernels";
import { afterAll, beforeAll, expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import { createActivations } from "./activations.ts";
import { MemoryAccount } from "./memory-account.ts";
import { type ModelWeights, uploadModelWeights } from "./model-weights.ts";
import { createOutputHead, type HeadRow } from "./output-head.ts";
import { StepPass } from "./step-pass.ts";
import { promptTokens } from "./testing/sequences.ts";
import { createTokenTables } from "./token-tables.ts";

const ROWS = 8;
const STEPS = 2;

let gpu: Gpu;
let memory: MemoryAccount;
let weights: ModelWeights;
const model = dummyModel("tiny-llama");
const { config } = model;
beforeAll(async () => {
  gpu = await openGpu({ unchecked: false });
  memory = new MemoryAccount(gpu);
  weights = await uploadModelWeights(gpu, memory, model);
});
afterAll(async () => {
  memory.destroy();
  await gpu.close();
});

/** Results of two steps, by entry of the log, and the tokens that the slots and the next step start from. */
async function sample(slabRows: number) {
  const activations = createActivations(memory, config, {
    type: "f32",
    maxPrefillRows: 32,
    maxSequences: ROWS,
    fusedGate: false,
  });
  const hidden = Float32Array.from(promptTokens(ROWS * config.hidden, 2001, 9), (token) => token / 1000 - 1);
  gpu.device.queue.writeBuffer(activations.hidden, 0, hidden);
  const log = createStorage(gpu, "log", ROWS * STEPS * SAMPLE_RESULT_BYTES);
  const tables = await createTokenTables(gpu, memory, activations.decodeTokens, log, ROWS);
  const head = await createOutputHead(gpu, memory, {
    config,
    weights,
    activations,
    settings: { input: "f32", numerics: "invariant", dialect: "device" },
    scratch: {
      logits: createStorage(gpu, "logits", slabRows * config.vocabulary * 4),
      slabRows,
      sampler: await createSampler(gpu, { vocabulary: config.vocabulary, maxRows: slabRows }),
    },
    phase: "decode",
    maxRows: ROWS,
    feedback: tables.decode,
  });
  const slots = [3, 1, 4, 0, 5, 7, 2, 6];
  const sampling = { temperature: 1, topK: 0, topP: 1 };
  const rows = slots.map((slot, row): HeadRow => ({ row, position: 5, sample: { ...sampling, seed: BigInt(slot) } }));
  tables.uploadDecode(slots.map((slot) => ({ slot, position: 4, pageTable: [], sample: { ...sampling, seed: 0n } })));
  head.prepare(rows);
  const step = new StepPass(gpu.device);
  for (let index = 0; index < STEPS; index++) head.encode(step, ROWS, index * ROWS);
  step.end();
  gpu.device.queue.submit([step.encoder.finish()]);
  const words = async (buffer: GPUBuffer) => [...new Uint32Array(await readBuffer(gpu, buffer))];
  const entries = await words(log);
  const token = (entry: number) => entries[(entry * SAMPLE_RESULT_BYTES) / 4];
  expect((await words(activations.decodeTokens)).slice(0, ROWS)).toEqual(slots.map((_, row) => token(ROWS + row)));
  const slotTokens = await words(tables.decode.slotTokens);
  slots.forEach((slot, row) => {
    expect(slotTokens[slot]).toBe(token(ROWS + row));
  });
  return entries;
}

test("rows that take the head in several slabs get what they get in one", async () => {
  const whole = await sample(ROWS);
  const tokens = whole.filter((_, word) => word % 4 === 0);
  expect(new Set(tokens).size).toBeGreaterThan(ROWS / 2);
  // The second step draws at the next position: from the same logits, but another number.
  expect(tokens.slice(ROWS)).not.toEqual(tokens.slice(0, ROWS));
  for (const slabRows of [1, 3, 5]) expect(await sample(slabRows)).toEqual(whole);
});
