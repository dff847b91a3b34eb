import { type DeviceProfile, type Gpu, openGpu } from "@kivimesh/kernels";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import type { DecodeRow, ModelRunner, PrefillChunk, StepResult } from "./model-runner.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { chunkOf, GREEDY, pages, prefill, promptTokens } from "./testing/sequences.ts";

const WINDOW = 32;
const VOCABULARY = 320;
const LENGTH = 150;

function logitsOf(result: StepResult, slot: number): Float32Array {
  const row = result.sampled.find((sampled) => sampled.slot === slot);
  if (row?.logits === undefined) throw new Error(`slot ${slot} has no logits`);
  return row.logits;
}

/** Bits, so that a zero's sign counts and a mismatch prints small. */
function expectSameBits(actual: Float32Array, expected: Float32Array): void {
  const bits = (array: Float32Array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);
  expect(expected.every(Number.isFinite)).toBe(true);
  expect(Buffer.compare(bits(actual), bits(expected))).toBe(0);
}

const CASES: readonly (readonly [string, string, DeviceProfile])[] = [
  ["tiny-llama", "f16", "software"],
  ["tiny-llama", "kivi2r", "software"],
  ["tiny-llama-mha", "kivi2r", "software"],
  ["tiny-llama", "kivi4", "software"],
  ["tiny-llama", "kivi2r", "hardware"],
];

describe.each(CASES)(
  "%s, %s, %s kernels: a row's bits depend on its own sequence only",
  (architecture, kvFormat, profile) => {
    let gpu: Gpu;
    let runner: ModelRunner;
    const tokens = promptTokens(LENGTH, VOCABULARY, 1);
    const table = pages(0, 6);

    beforeAll(async () => {
      gpu = await openGpu({ profile, unchecked: false });
      const model = dummyModel(architecture);
      const maxContextTokens = 512;
      runner = await openModelRunner({
        model,
        gpu,
        kvFormat,
        blockTokens: WINDOW,
        residualTokens: WINDOW,
        maxContextTokens,
      });
    });
    afterAll(async () => {
      await runner.close();
      await gpu.close();
    });

    /** Other sequences' work, in slots 4 and up. */
    async function company(): Promise<{ prefill: PrefillChunk[]; decode: DecodeRow[] }> {
      const decode: DecodeRow[] = [];
      for (const [index, length] of [37, 64, 95].entries()) {
        const other = promptTokens(length, VOCABULARY, 20 + index);
        const pageTable = pages(40 + index * 6, 6);
        const { token } = await prefill(runner, other, 4 + index, pageTable);
        decode.push({ slot: 4 + index, token, position: length, pageTable, sample: GREEDY });
      }
      const other = promptTokens(70, VOCABULARY, 30);
      return { prefill: [chunkOf(other, 0, 70, 7, pages(60, 6))], decode };
    }

    test("however the prompt is cut into chunks", async () => {
      const whole = await prefill(runner, tokens, 0, table);
      for (const cuts of [[32], [64, 128], [32, 64, 96, 128]]) {
        const cut = await prefill(runner, tokens, 1, pages(10, 6), cuts);
        expectSameBits(cut.logits, whole.logits);
        expect(cut.token).toBe(whole.token);
      }
    });

    test("whatever else is prefilled and decoded in the step, and at which row", async () => {
      const alone = await prefill(runner, tokens, 0, table);
      const others = await company();
      const chunk = chunkOf(tokens, 0, LENGTH, 1, pages(10, 6));
      const after = await runner.step({ prefill: [...others.prefill, chunk], decode: others.decode });
      expectSameBits(logitsOf(after, 1), alone.logits);
      const before = await runner.step({ prefill: [chunk, ...others.prefill], decode: [] });
      expectSameBits(logitsOf(before, 1), alone.logits);
    });

    test("whether it decodes alone or in a batch, over sealed windows", async () => {
      const run = async (slot: number, pageTable: number[], batched: boolean) => {
        const { token } = await prefill(runner, tokens, slot, pageTable);
        const others = batched ? (await company()).decode : [];
        const logits: Float32Array[] = [];
        let next = token;
        // Across the end of a window, so that decode seals one and then reads it.
        for (let position = LENGTH; position < LENGTH + 20; position++) {
          const row = { slot, token: next, position, pageTable, sample: GREEDY, returnLogits: true };
          const batch = others.map((other) => ({ ...other, position: other.position + position - LENGTH }));
          const result = await runner.step({ prefill: [], decode: [...batch.slice(0, 2), row, ...batch.slice(2)] });
          expect(result.nonFiniteSlots).toEqual([]);
          logits.push(logitsOf(result, slot));
          next = result.sampled.find((sampled) => sampled.slot === slot)?.token ?? -1;
        }
        return logits;
      };
      const alone = await run(0, pages(0, 6), false);
      const batched = await run(2, pages(20, 6), true);
      for (const [step, logits] of alone.entries()) expectSameBits(batched[step] as Float32Array, logits);
    });

    test("whether its blocks were computed here or brought back from bytes", async () => {
      const cold = await prefill(runner, tokens, 0, table);
      const stored: Uint8Array[] = [];
      for (const page of table.slice(0, 4)) stored.push(await runner.readBlock(page));
      expect(stored[0]).toHaveLength(runner.kv.blockBytes);
      expect(Buffer.compare(stored[0] as Uint8Array, stored[1] as Uint8Array)).not.toBe(0);
      const elsewhere = [33, 31, 35, 34, 30, 32];
      for (const hit of [1, 3, 4]) {
        for (const page of elsewhere) runner.writeBlock(page, new Uint8Array(runner.kv.blockBytes).fill(0x55));
        stored.slice(0, hit).forEach((payload, block) => {
          runner.writeBlock(elsewhere[block] as number, payload);
        });
        const warm = await prefill(runner, tokens, 3, elsewhere, [], hit * WINDOW);
        expectSameBits(warm.logits, cold.logits);
        // Blocks that the hit did not cover are sealed to the same bytes again.
        for (let block = 0; block < 4; block++) {
          const payload = await runner.readBlock(elsewhere[block] as number);
          expect(Buffer.compare(payload, stored[block] as Uint8Array)).toBe(0);
        }
      }
      runner.writeBlock(elsewhere[0] as number, new Uint8Array(runner.kv.blockBytes));
      const spoiled = await prefill(runner, tokens, 3, elsewhere, [], 4 * WINDOW);
      expect(spoiled.logits).not.toEqual(cold.logits);
    });
  },
);
