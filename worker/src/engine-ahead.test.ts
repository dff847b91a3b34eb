/** Steps planned ahead of their results give what single steps give, whatever happens meanwhile. */
import { afterEach, describe, expect, it } from "vitest";
import type { EngineConfig } from "./config.ts";
import type { FinishedEvent } from "./generation.ts";
import { type OpenEngine, openEngine, type SimpleGeneration } from "./open-engine.ts";

const base: EngineConfig = {
  dummyArchitecture: "tiny-llama",
  kvFormat: "kivi2r",
  blockTokens: 32,
  residualTokens: 32,
  maxSequences: 4,
  maxPrefillRows: 64,
  maxContextTokens: 256,
  submitLatencyMs: Number.POSITIVE_INFINITY,
};

const single: EngineConfig = { ...base, decodeStepsPerSubmit: 1, submitsInFlight: 1 };

/** Steps a submit, and submits under way at once. */
const ahead = [
  [1, 2],
  [4, 1],
  [4, 2],
  [8, 2],
  [8, 3],
] as const;

const engines: OpenEngine[] = [];
async function open(config: EngineConfig): Promise<OpenEngine> {
  const engine = await openEngine(config);
  engines.push(engine);
  return engine;
}
afterEach(async () => {
  for (const engine of engines.splice(0)) {
    expect(engine.engine.checkIntegrity()).toEqual([]);
    await engine.close();
  }
});

function prompt(length: number, seed: number): number[] {
  return Array.from({ length }, (_, index) => (Math.imul(seed * 4099 + index + 1, 2_654_435_761) >>> 8) % 256);
}

interface Answer {
  readonly ids: number[];
  readonly logprobs: number[];
  readonly finished: FinishedEvent;
}

async function run(engine: OpenEngine, request: SimpleGeneration): Promise<Answer> {
  const ids: number[] = [];
  const logprobs: number[] = [];
  for await (const event of engine.generate(request)) {
    if (event.type === "finished") return { ids, logprobs, finished: event };
    expect(event.index).toBe(ids.length);
    expect(event.logprobs).toHaveLength(event.ids.length);
    ids.push(...event.ids);
    logprobs.push(...event.logprobs);
  }
  throw new Error("the stream ended without a finish");
}

function runAll(engine: OpenEngine, requests: readonly SimpleGeneration[]): Promise<Answer[]> {
  return Promise.all(requests.map((request) => run(engine, request)));
}

/** More than there are slots, of many lengths, greedy and drawn; windows end before, in and after the answers. */
const requests: SimpleGeneration[] = [33, 64, 7, 90, 61, 30, 95].map((length, index) => ({
  tokens: prompt(length, index),
  maxTokens: [70, 33, 5, 64, 1, 41, 90][index] as number,
  sampling: { temperature: index % 3, topK: 50, topP: 0.9, seed: BigInt(index) },
}));

describe("Engine, steps ahead", () => {
  it("gives the tokens of single steps, with stop tokens in the middle of a submit", async () => {
    const plain = await open(single);
    const whole = await runAll(plain, requests);
    // Each of the longer answers is stopped somewhere; not at a multiple of the steps.
    const stopped = requests.map((request, index): SimpleGeneration => {
      const stop = whole[index]?.ids[3 + 5 * index];
      return stop === undefined ? request : { ...request, stopTokenIds: [stop] };
    });
    const expected = await runAll(plain, stopped);
    expect(expected.filter(({ finished }) => finished.outcome === "stopToken").length).toBeGreaterThan(3);
    for (const [decodeStepsPerSubmit, submitsInFlight] of ahead) {
      const engine = await open({ ...base, decodeStepsPerSubmit, submitsInFlight });
      const answers = await runAll(engine, requests);
      const cut = await runAll(engine, stopped);
      for (const [actual, right] of [
        [answers, whole],
        [cut, expected],
      ] as const) {
        for (const [index, { ids, logprobs, finished }] of actual.entries()) {
          const { ids: rightIds, logprobs: rightLogprobs, finished: rightEnd } = right[index] as Answer;
          expect(ids).toEqual(rightIds);
          expect(logprobs).toEqual(rightLogprobs);
          expect(finished.outcome).toBe(rightEnd.outcome);
          const { completionTokens, kvF16Bytes, kvStoredBytes } = finished.usage;
          expect({ completionTokens, kvF16Bytes, kvStoredBytes }).toMatchObject({
            completionTokens: rightEnd.usage.completionTokens,
            kvF16Bytes: rightEnd.usage.kvF16Bytes,
            kvStoredBytes: rightEnd.usage.kvStoredBytes,
          });
        }
      }
      const stats = engine.stats();
      expect(stats).toMatchObject({ running: 0, waiting: 0, referencedPages: 0, integrityViolations: [] });
      if (decodeStepsPerSubmit > 1) expect(stats.submits).toBeLessThan(0.7 * stats.steps);
    }
  });

  it("gives the same tokens when pages run out and sequences are preempted", async () => {
    const long = [60, 65, 70, 75].map((length, index) => ({ tokens: prompt(length, 40 + index), maxTokens: 120 }));
    const plain = await open(single);
    const expected = await runAll(plain, long);
    const { blockBytes } = plain.runner.kv;
    for (const [decodeStepsPerSubmit, submitsInFlight] of ahead) {
      const tight = await open({ ...base, kvBytes: blockBytes * 9, decodeStepsPerSubmit, submitsInFlight });
      const answers = await runAll(tight, long);
      expect(tight.stats().preemptions).toBeGreaterThan(0);
      for (const [index, { ids }] of answers.entries()) expect(ids).toEqual(expected[index]?.ids);
      expect(tight.stats()).toMatchObject({ referencedPages: 0, integrityViolations: [] });
    }
  });

  it("gives up aborted sequences while steps of theirs run, and their slots and pages to others", async () => {
    const lasting = { tokens: prompt(45, 70), maxTokens: 100 };
    const plain = await open(single);
    const expected = await run(plain, lasting);
    const { blockBytes } = plain.runner.kv;
    for (const [decodeStepsPerSubmit, submitsInFlight] of ahead) {
      const sizes = { maxSequences: 2, kvBytes: blockBytes * 12 };
      const engine = await open({ ...base, ...sizes, decodeStepsPerSubmit, submitsInFlight });
      for (let round = 0; round < 6; round++) {
        const leaving = (async () => {
          let seen = 0;
          for await (const event of engine.generate({ tokens: prompt(50 + round, 80 + round), maxTokens: 150 })) {
            if (event.type === "tokens") seen += event.ids.length;
            if (seen > 11 * round) return;
          }
        })();
        const others = runAll(engine, [lasting, { tokens: prompt(33 + round, 90), maxTokens: 9 }]);
        await leaving;
        expect((await others)[0]?.ids).toEqual(expected.ids);
      }
      await expect.poll(() => engine.stats().running).toBe(0);
      expect(engine.stats()).toMatchObject({ referencedPages: 0, integrityViolations: [] });
    }
  });

  it("shares blocks of answers under fast numerics as single steps do", async () => {
    const tokens = prompt(50, 60);
    const sources = async (config: EngineConfig) => {
      const engine = await open({ ...config, numerics: "fast" });
      const first = await run(engine, { tokens, maxTokens: 60 });
      const again = await run(engine, { tokens: [...tokens, ...first.ids], maxTokens: 3 });
      return { ids: first.ids, sources: again.finished.usage.sources };
    };
    const expected = await sources(single);
    expect(expected.sources.gpu).toBe(96);
    for (const [decodeStepsPerSubmit, submitsInFlight] of ahead) {
      expect(await sources({ ...base, decodeStepsPerSubmit, submitsInFlight })).toEqual(expected);
    }
  });

  it("keeps a submit within its latency limit", async () => {
    const engine = await open({ ...base, decodeStepsPerSubmit: 16, submitLatencyMs: 1e-3 });
    await run(engine, { tokens: prompt(20, 1), maxTokens: 20 });
    const { steps, submits } = engine.stats();
    expect(submits).toBe(steps);
  });

  it("refuses what the runner does not take", async () => {
    await expect(openEngine({ ...base, decodeStepsPerSubmit: 1000 })).rejects.toThrow(/decodeStepsPerSubmit is 1000/);
    await expect(openEngine({ ...base, submitsInFlight: 9 })).rejects.toThrow(
      /submitsInFlight is 9: it must be 1 to 3/,
    );
  });
});
