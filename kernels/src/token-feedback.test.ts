import { afterAll, beforeAll, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { SAMPLE_PARAMETER_BYTES, SAMPLE_RESULT_BYTES, writeSampleParameters } from "./sample.ts";
import { createPoisoned } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";
import { createTokenFeedback, TOKEN_OF_SLOT } from "./token-feedback.ts";

const random = seededRandom("token-feedback");
let gpu: Gpu;
beforeAll(async () => {
  gpu = await openGpu({ unchecked: false });
});
afterAll(() => gpu.close());

const shuffled = (count: number) => {
  const slots = Array.from({ length: count }, (_, slot) => slot);
  for (let i = count - 1; i > 0; i--) {
    const other = random.integer(0, i);
    [slots[i], slots[other]] = [slots[other] as number, slots[i] as number];
  }
  return slots;
};

test("a row starts from its own token or from the one that its slot sampled last", async () => {
  const feedback = await createTokenFeedback(gpu);
  for (const count of [1, 63, 64, 65, 130]) {
    const slots = shuffled(count + 7).slice(0, count);
    const last = Uint32Array.from({ length: count + 7 }, () => random.integer(0, 50_000));
    const own = slots.map(() => (random.integer(0, 1) === 0 ? TOKEN_OF_SLOT : random.integer(0, 50_000)));
    const tokens = createPoisoned(gpu, "tokens", count * 4);
    const load = feedback.bindLoad({
      rows: uploadStorage(gpu, "rows", Uint32Array.from(slots.flatMap((slot, row) => [slot, own[row] as number]))),
      slotTokens: uploadStorage(gpu, "slot tokens", last),
      tokens: tokens.buffer,
    });
    submitPass(gpu, (pass) => load.encode(pass, count));
    const expected = slots.map((slot, row) => (own[row] === TOKEN_OF_SLOT ? last[slot] : own[row]));
    expect([...new Uint32Array(await tokens.read())]).toEqual(expected);
  }
});

test("results go to the slots, to the next step, and to the log; positions move on; other rows stay", async () => {
  const feedback = await createTokenFeedback(gpu);
  const [count, first, logFirst] = [70, 5, 11];
  const slots = shuffled(100);
  const results = Uint32Array.from({ length: count * 4 }, () => random.integer(0, 50_000));
  const positions = Array.from({ length: count }, () => random.integer(0, 9_000));
  const parameters = new DataView(new ArrayBuffer(count * SAMPLE_PARAMETER_BYTES));
  positions.forEach((position, row) => {
    const seeds = { seedLow: 7 + row, seedHigh: 9 + row };
    writeSampleParameters(parameters, row, { temperature: 0.5, topK: 3, topP: 0.25, ...seeds, position });
  });
  const expected = new DataView(parameters.buffer.slice(0));
  positions.forEach((position, row) => {
    expected.setUint32(row * SAMPLE_PARAMETER_BYTES + 20, position + 2, true);
  });
  const buffers = {
    results: uploadStorage(gpu, "results", results),
    rows: uploadStorage(gpu, "rows", Uint32Array.from(slots.flatMap((slot) => [slot, 0]))),
    slotTokens: createPoisoned(gpu, "slot tokens", 100 * 4),
    tokens: createPoisoned(gpu, "tokens", 100 * 4),
    parameters: createPoisoned(gpu, "parameters", parameters.byteLength),
    log: createPoisoned(gpu, "log", 200 * SAMPLE_RESULT_BYTES),
  };
  for (const { buffer } of [buffers.slotTokens, buffers.tokens]) {
    gpu.device.queue.writeBuffer(buffer, 0, new Uint32Array(100).fill(77));
  }
  gpu.device.queue.writeBuffer(buffers.parameters.buffer, 0, parameters.buffer);
  const store = feedback.bindStore({
    results: buffers.results,
    rows: buffers.rows,
    slotTokens: buffers.slotTokens.buffer,
    tokens: buffers.tokens.buffer,
    parameters: buffers.parameters.buffer,
    log: buffers.log.buffer,
  });
  submitPass(gpu, (pass) => {
    store.encode(pass, first, count, logFirst);
    store.encode(pass, first, count, logFirst + count);
  });
  const words = async (poisoned: { read(): Promise<ArrayBuffer> }) => new Uint32Array(await poisoned.read());
  const slotTokens = await words(buffers.slotTokens);
  const tokens = await words(buffers.tokens);
  const log = await words(buffers.log);
  for (let row = 0; row < count; row++) {
    expect(slotTokens[slots[first + row] as number]).toBe(results[row * 4]);
    expect(tokens[first + row]).toBe(results[row * 4]);
    for (const copy of [0, count]) {
      const entry = logFirst + copy + first + row;
      expect(log.slice(entry * 4, entry * 4 + 4)).toEqual(results.slice(row * 4, row * 4 + 4));
    }
  }
  expect([...tokens.slice(0, first)]).toEqual(Array.from({ length: first }, () => 77));
  expect(tokens[first + count]).toBe(77);
  for (const slot of slots.slice(0, first)) expect(slotTokens[slot]).toBe(77);
  expect(new Uint8Array(await buffers.parameters.read())).toEqual(new Uint8Array(expected.buffer));
});
