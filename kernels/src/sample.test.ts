import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { logProbability, pcg4d, sampleDistribution } from "./sample.reference.ts";
import {
  createSampler,
  readSampleResult,
  SAMPLE_PARAMETER_BYTES,
  SAMPLE_RESULT_BYTES,
  type SampleParameters,
  type SampleResult,
  type SampleVariant,
  writeSampleParameters,
} from "./sample.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";

const VARIANTS: readonly SampleVariant[] = ["rows", "slices"];

const GREEDY: SampleParameters = { temperature: 0, topK: 0, topP: 1, seedLow: 0, seedHigh: 0, position: 0 };

// Software drivers take long to compile the slices, the first time.
describe.each(VARIANTS)("sample by %s", { timeout: 400_000 }, (variant) => {
  let gpu: Gpu;
  const random = seededRandom(`sample by ${variant}`);
  beforeAll(async () => {
    gpu = await openGpu({ unchecked: false });
  });
  afterAll(() => gpu.close());

  async function run(logits: Float32Array, requests: readonly SampleParameters[]): Promise<SampleResult[]> {
    const rows = requests.length;
    const sampler = await createSampler(gpu, { vocabulary: logits.length / rows, maxRows: rows, variant });
    const view = new DataView(new ArrayBuffer(rows * SAMPLE_PARAMETER_BYTES));
    for (const [row, request] of requests.entries()) writeSampleParameters(view, row, request);
    const output = createPoisoned(gpu, "output", rows * SAMPLE_RESULT_BYTES);
    const logitsBuffer = uploadStorage(gpu, "logits", logits);
    const bound = sampler.bind({
      logits: logitsBuffer,
      parameters: uploadStorage(gpu, "parameters", view),
      output: output.buffer,
    });
    submitPass(gpu, (pass) => bound.encode(pass, rows));
    const content = await output.read();
    assertNoPoison("sample", content);
    logitsBuffer.destroy();
    return requests.map((_, row) => readSampleResult(new DataView(content), row));
  }

  test("greedy takes the first of the best, with its log probability", async () => {
    for (const vocabulary of [1, 2, 63, 65, 1025, random.integer(2, 60000)]) {
      const rows = random.integer(1, 4);
      const logits = random.normals(vocabulary * rows, 4);
      // A tie for the best, in two places.
      const best = Math.max(...Array.from({ length: rows }, () => 30));
      const places = Array.from({ length: rows }, () => [
        random.integer(0, vocabulary - 1),
        random.integer(0, vocabulary - 1),
      ]);
      for (const [row, pair] of places.entries()) for (const place of pair) logits[row * vocabulary + place] = best;
      const results = await run(
        logits,
        Array.from({ length: rows }, () => GREEDY),
      );
      for (const [row, result] of results.entries()) {
        const mine = logits.slice(row * vocabulary, (row + 1) * vocabulary);
        expect(result.token).toBe(Math.min(...(places[row] as number[])));
        expect(result.nonFinite).toBe(false);
        expect(Math.abs(result.logprob - logProbability(mine, result.token))).toBeLessThan(2e-5);
      }
    }
  });

  test("greedy takes the lower of two neighbours, wherever they are", async () => {
    const vocabulary = 2048;
    const rows = 60;
    const logits = random.normals(vocabulary * rows);
    const firsts = Array.from({ length: rows }, () => random.integer(0, vocabulary - 2));
    for (const [row, first] of firsts.entries())
      logits.fill(20, row * vocabulary + first, row * vocabulary + first + 2);
    const results = await run(
      logits,
      firsts.map(() => GREEDY),
    );
    expect(results.map(({ token }) => token)).toEqual(firsts);
  });

  test("draws within the kept tokens, at the place that the random number says", async () => {
    let tested = 0;
    for (const vocabulary of [1, 7, 64, 65, 1000, random.integer(3, 9000)]) {
      const requests = Array.from(
        { length: 12 },
        (_, row): SampleParameters => ({
          temperature: random.pick([0.01, 0.3, 0.7, 1, 1.7]),
          topK: random.pick([0, 0, 1, 2, 40, 300, 1000, vocabulary, vocabulary + 5]),
          topP: random.pick([1, 1, 0, 0.1, 0.5, 0.9, 0.99]),
          seedLow: random.uint32(),
          seedHigh: random.uint32(),
          position: row,
        }),
      );
      const logits = random.normals(vocabulary * requests.length, random.pick([0.1, 2, 8]));
      const results = await run(logits, requests);
      for (const [row, result] of results.entries()) {
        const request = requests[row] as SampleParameters;
        const mine = logits.slice(row * vocabulary, (row + 1) * vocabulary);
        const { kept, margin } = sampleDistribution(mine, request);
        if (margin < 1e-5) continue;
        const place = pcg4d(request.seedLow, request.seedHigh, request.position) / 2 ** 32;
        const index = kept.findIndex(({ token }) => token === result.token);
        const context = `vocabulary ${vocabulary}, ${JSON.stringify(request)}, kept ${kept.length}, token ${result.token}`;
        expect(index, context).toBeGreaterThanOrEqual(0);
        const before = kept.slice(0, index).reduce((sum, entry) => sum + entry.probability, 0);
        expect(place, context).toBeGreaterThan(before - 2e-5);
        expect(place, context).toBeLessThan(before + (kept[index]?.probability ?? 0) + 2e-5);
        expect(Math.abs(result.logprob - logProbability(mine, result.token)), context).toBeLessThan(1e-4);
        tested++;
      }
    }
    expect(tested).toBeGreaterThan(40);
  });

  test("among equal logits top-k and top-p keep the lowest indices", async () => {
    const rows = 64;
    const logits = new Float32Array(10 * rows).fill(1);
    const base: SampleParameters = { ...GREEDY, temperature: 1 };
    const byCount = await run(
      logits,
      Array.from({ length: rows }, (_, position) => ({ ...base, topK: 3, position })),
    );
    expect(new Set(byCount.map(({ token }) => token))).toEqual(new Set([0, 1, 2]));
    const byMass = await run(
      logits,
      Array.from({ length: rows }, (_, position) => ({ ...base, topP: 0.35, position })),
    );
    expect(new Set(byMass.map(({ token }) => token))).toEqual(new Set([0, 1, 2, 3]));
    const both = await run(
      logits,
      Array.from({ length: rows }, (_, position) => ({ ...base, topK: 4, topP: 0.5, position })),
    );
    expect(new Set(both.map(({ token }) => token))).toEqual(new Set([0, 1]));
  });

  test("frequencies follow the probabilities", async () => {
    const rows = 4000;
    const one = Float32Array.from([0, 1, 2, 3, -1, 2.5]);
    const logits = new Float32Array(rows * one.length);
    for (let row = 0; row < rows; row++) logits.set(one, row * one.length);
    const seedLow = random.uint32();
    const requests = Array.from({ length: rows }, (_, position) => ({ ...GREEDY, temperature: 1, seedLow, position }));
    const results = await run(logits, requests);
    for (const { token, probability } of sampleDistribution(one, requests[0] as SampleParameters).kept) {
      const share = results.filter((result) => result.token === token).length / rows;
      // Five standard deviations.
      expect(Math.abs(share - probability)).toBeLessThan(5 * Math.sqrt((probability * (1 - probability)) / rows));
    }
  });

  test("a row's draw does not depend on the other rows", async () => {
    const vocabulary = 500;
    const logits = random.normals(vocabulary * 5, 3);
    const requests = Array.from({ length: 5 }, () => ({
      ...GREEDY,
      temperature: 0.8,
      topK: 50,
      topP: 0.9,
      seedLow: random.uint32(),
      position: random.integer(0, 99),
    }));
    const together = await run(logits, requests);
    for (const [row, request] of requests.entries()) {
      const alone = await run(logits.slice(row * vocabulary, (row + 1) * vocabulary), [request]);
      expect(alone[0]).toEqual(together[row]);
    }
  });

  test("NaN and infinities raise the flag and are never chosen", async () => {
    const vocabulary = 300;
    for (const poison of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
      for (const temperature of [0, 1]) {
        const logits = random.normals(2 * vocabulary);
        logits[random.integer(0, vocabulary - 1)] = poison;
        const [bad, good] = await run(logits, [
          { ...GREEDY, temperature },
          { ...GREEDY, temperature },
        ]);
        expect(bad?.nonFinite).toBe(true);
        expect(good?.nonFinite).toBe(false);
        expect(Number.isFinite(logits[bad?.token ?? -1])).toBe(true);
      }
    }
    const nothing = await run(new Float32Array(10).fill(Number.NaN), [{ ...GREEDY, temperature: 1 }]);
    expect(nothing[0]).toMatchObject({ token: 0, nonFinite: true });
  });

  test("negative, zero and huge logits keep their order", async () => {
    const cases = [
      [-5, -3, -4],
      [-0, 0, -1],
      [3e38, -3e38, 1],
      [1e-40, 0, -1e-40],
    ];
    const expected = [1, 0, 0, 0];
    for (const [index, logits] of cases.entries()) {
      const results = await run(Float32Array.from(logits), [GREEDY]);
      expect(results[0]?.token).toBe(expected[index]);
    }
  });

  test("refuses more rows than it was made for", async () => {
    const sampler = await createSampler(gpu, { vocabulary: 8, maxRows: 1, variant });
    const buffer = uploadStorage(gpu, "b", new Float32Array(64));
    const output = uploadStorage(gpu, "o", new Float32Array(64));
    const bound = sampler.bind({ logits: buffer, parameters: buffer, output });
    expect(() => submitPass(gpu, (pass) => bound.encode(pass, 2))).toThrow(/2 rows, must be 1 … 1/);
    await expect(createSampler(gpu, { vocabulary: 0, maxRows: 1, variant })).rejects.toThrow(/vocabulary 0/);
  });
});
