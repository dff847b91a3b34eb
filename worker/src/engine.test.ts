import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { BlockFetch, BlockSink, BlockTransfer, SealedBlock } from "./block-transfer.ts";
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
  maxContextTokens: 512,
};

interface Answer {
  ids: number[];
  logits: Float32Array | undefined;
  finished: FinishedEvent;
}

async function run(
  engine: OpenEngine,
  request: SimpleGeneration,
  onToken: () => void = () => undefined,
): Promise<Answer> {
  const ids: number[] = [];
  let logits: Float32Array | undefined;
  for await (const event of engine.generate({ returnFirstLogits: true, ...request })) {
    if (event.type === "finished") return { ids, logits, finished: event };
    expect(event.index).toBe(ids.length);
    ids.push(...event.ids);
    logits ??= event.firstLogits;
    onToken();
  }
  throw new Error("the stream ended without a finish");
}

/** Deterministic tokens; other seeds give other prompts. */
function prompt(length: number, seed: number): number[] {
  let state = seed * 2654435761 + 1;
  return Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state % 256;
  });
}

/** Logits as bit patterns; they must differ among themselves, or equality would say nothing. */
function bits(answer: Answer): Uint32Array {
  const { logits } = answer;
  expect(new Set(logits).size).toBeGreaterThan(100);
  return new Uint32Array(logits!.buffer, logits!.byteOffset, logits!.length);
}

function expectClean(engine: OpenEngine): void {
  const stats = engine.stats();
  expect(stats).toMatchObject({ running: 0, waiting: 0, referencedPages: 0, integrityViolations: [] });
}

/** Blocks of one engine for another, in memory; a payload can be spoiled on its way. */
class BlockShelf implements BlockTransfer {
  readonly payloads = new Map<string, Uint8Array>();
  readonly fetched: string[] = [];
  #reading: Promise<void>[] = [];
  source: OpenEngine | undefined;

  sealed(blocks: readonly SealedBlock[]): void {
    for (const { id } of blocks) {
      this.#reading.push(
        this.source!.engine.readBlock(id).then((payload) => {
          if (payload !== undefined) this.payloads.set(id, payload);
        }),
      );
    }
  }

  async settled(): Promise<void> {
    await Promise.all(this.#reading.splice(0));
  }

  fetch({ fetchId, ids }: BlockFetch, sink: BlockSink): void {
    let bytes = 0;
    for (const id of ids) {
      const payload = this.payloads.get(id);
      if (payload === undefined) break;
      this.fetched.push(id);
      bytes += payload.length;
      sink.block(fetchId, id, payload);
    }
    sink.ended(fetchId, { bytes, seconds: 0.001 });
  }
}

describe("Engine on a tiny model", () => {
  let engine: OpenEngine;

  beforeAll(async () => {
    engine = await openEngine(base);
  });

  afterAll(async () => {
    await engine.close();
  });

  it("answers a hit with the tokens and the logit bits of the miss", async () => {
    const tokens = prompt(150, 1);
    const miss = await run(engine, { tokens, maxTokens: 40 });
    expect(miss.ids).toHaveLength(40);
    expect(miss.finished.outcome).toBe("length");
    expect(miss.finished.usage.sources).toEqual({ gpu: 0, peer: 0, cachestore: 0, computed: 150 });
    const hit = await run(engine, { tokens, maxTokens: 40 });
    expect(hit.finished.usage.sources).toEqual({ gpu: 128, peer: 0, cachestore: 0, computed: 22 });
    expect(hit.ids).toEqual(miss.ids);
    expect(bits(hit)).toEqual(bits(miss));
    expectClean(engine);
  });

  it("computes at least the last token of a prompt that ends with a window", async () => {
    const tokens = prompt(96, 2);
    const miss = await run(engine, { tokens, maxTokens: 3 });
    const hit = await run(engine, { tokens, maxTokens: 3 });
    expect(hit.finished.usage.sources).toMatchObject({ gpu: 64, computed: 32 });
    expect(hit.ids).toEqual(miss.ids);
    expect(bits(hit)).toEqual(bits(miss));
  });

  it("gives a sequence the same bits alone and in a batch of 4", async () => {
    const requests = [70, 33, 129, 200].map((length, seed) => ({
      tokens: prompt(length, 10 + seed),
      maxTokens: 64,
      tenantNamespace: new Uint8Array(32).fill(1),
    }));
    // Alone in an engine of their own: its blocks cannot be hits of those that run together.
    const other = await openEngine(base);
    const alone: Answer[] = [];
    for (const request of requests) alone.push(await run(other, request));
    await other.close();

    const before = engine.stats();
    const steps = new Map<number, number>();
    const note = () => {
      const { steps: done, decodeTokens } = engine.stats();
      steps.set(done, decodeTokens);
    };
    const together = await Promise.all(requests.map((request) => run(engine, request, note)));
    const rows = [...steps].map(([step, tokens]) => tokens - (steps.get(step - 1) ?? tokens));
    expect(rows.filter((count) => count === 4).length).toBeGreaterThan(10);
    const prefilled = engine.stats().prefillTokens - before.prefillTokens;
    expect(prefilled).toBe(requests.reduce((sum, { tokens }) => sum + tokens.length, 0));
    for (const [index, answer] of together.entries()) {
      expect(answer.finished.usage.sources).toMatchObject({ gpu: 0, computed: requests[index]!.tokens.length });
      expect(answer.ids).toEqual(alone[index]!.ids);
      expect(bits(answer)).toEqual(bits(alone[index]!));
    }
    expectClean(engine);
  });

  it("shares blocks inside a tenant namespace only", async () => {
    const tokens = prompt(100, 20);
    await run(engine, { tokens, maxTokens: 1 });
    const same = await run(engine, { tokens, maxTokens: 1 });
    const foreign = await run(engine, { tokens, maxTokens: 1, tenantNamespace: new Uint8Array(32).fill(9) });
    expect(same.finished.usage.sources.gpu).toBe(96);
    expect(foreign.finished.usage.sources.gpu).toBe(0);
  });

  it("goes on with the same tokens when a request is resumed behind some of its answer", async () => {
    const tokens = prompt(50, 30);
    const whole = await run(engine, { tokens, maxTokens: 60 });
    for (const done of [1, 20, 40]) {
      const resumed = await run(engine, {
        tokens: [...tokens, ...whole.ids.slice(0, done)],
        promptTokens: tokens.length,
        maxTokens: 60 - done,
      });
      expect(resumed.ids).toEqual(whole.ids.slice(done));
      expect(resumed.finished.usage).toMatchObject({ promptTokens: 50, completionTokens: 60 });
    }
  });

  it("samples the same tokens for the same seed, others for another", async () => {
    const request = (seed: bigint) => ({
      tokens: prompt(40, 40),
      maxTokens: 16,
      sampling: { temperature: 1, seed },
    });
    const [first, again, other] = [
      await run(engine, request(1n)),
      await run(engine, request(1n)),
      await run(engine, request(2n)),
    ];
    expect(again.ids).toEqual(first.ids);
    expect(other.ids).not.toEqual(first.ids);
  });

  it("ends before a stop token, which is neither delivered nor counted", async () => {
    const tokens = prompt(45, 50);
    const whole = await run(engine, { tokens, maxTokens: 20 });
    const stop = whole.ids[7]!;
    const stopped = await run(engine, { tokens, maxTokens: 20, stopTokenIds: [stop] });
    expect(stopped.finished.outcome).toBe("stopToken");
    expect(stopped.ids).toEqual(whole.ids.slice(0, whole.ids.indexOf(stop)));
    expect(stopped.finished.usage.completionTokens).toBe(stopped.ids.length);
  });

  it("reports KV bytes as f16 and as kept", async () => {
    const { finished } = await run(engine, { tokens: prompt(100, 60), maxTokens: 5 });
    const { kv } = engine.runner;
    // The last token was delivered without being computed.
    expect(finished.usage.kvF16Bytes).toBe(104 * kv.f16BytesPerToken);
    expect(finished.usage.kvStoredBytes).toBe(3 * kv.blockBytes + 8 * kv.f16BytesPerToken);
  });

  it("fails what it cannot run, each with its reason, and goes on", async () => {
    const fails = async (request: SimpleGeneration) => (await run(engine, request)).finished.error?.code;
    expect(await fails({ tokens: [], maxTokens: 1 })).toBe("INVALID_ARGUMENT");
    expect(await fails({ tokens: [1, 99_999], maxTokens: 1 })).toBe("INVALID_ARGUMENT");
    expect(await fails({ tokens: [1], maxTokens: 0 })).toBe("INVALID_ARGUMENT");
    expect(await fails({ tokens: [1], maxTokens: 1, sampling: { topP: 2 } })).toBe("INVALID_ARGUMENT");
    expect(await fails({ tokens: prompt(512, 1), maxTokens: 1 })).toBe("CONTEXT_LENGTH_EXCEEDED");
    expect((await run(engine, { tokens: [1], maxTokens: 1 })).finished.outcome).toBe("length");
  });

  it("ends at the context's end", async () => {
    const { ids, finished } = await run(engine, { tokens: prompt(500, 70), maxTokens: 100 });
    expect(ids).toHaveLength(12);
    expect(finished.outcome).toBe("length");
  });

  it("releases everything when requests are aborted while waiting, in prefill and in decode", async () => {
    const streams = Array.from({ length: 7 }, (_, index) =>
      engine.generate({ tokens: prompt(140 + index, 80 + index), maxTokens: 300, requestId: `abort-${index}` }),
    );
    const ends = streams.map(async (stream, index) => {
      let seen = 0;
      for await (const event of stream) {
        if (event.type === "finished") return event.outcome;
        if (index === 0 && ++seen === 3) {
          for (let other = 0; other < streams.length; other++) engine.engine.abort(`abort-${other}`, 0);
        }
      }
      return "left";
    });
    expect(new Set(await Promise.all(ends))).toEqual(new Set(["aborted"]));
    expectClean(engine);
  });

  it("aborts a request whose reader leaves", async () => {
    for await (const event of engine.generate({ tokens: prompt(40, 90), maxTokens: 400 })) {
      if (event.type === "tokens") break;
    }
    await expect.poll(() => engine.stats().running).toBe(0);
    expectClean(engine);
  });

  it("drops a stale epoch and ends the older one when a newer arrives", async () => {
    const older = run(engine, { tokens: prompt(40, 91), maxTokens: 400, requestId: "fenced", epoch: 1 });
    const newer = run(engine, { tokens: prompt(40, 91), maxTokens: 3, requestId: "fenced", epoch: 2 });
    expect((await older).finished.outcome).toBe("aborted");
    expect((await newer).finished.outcome).toBe("length");
    const stale = await run(engine, { tokens: prompt(40, 91), maxTokens: 3, requestId: "fenced", epoch: 1 });
    expect(stale).toMatchObject({ ids: [], finished: { outcome: "aborted" } });
  });
});

describe("Engine with little memory", () => {
  it("preempts, finishes everything with the same tokens, and returns every page", async () => {
    const roomy = await openEngine(base);
    const requests = [60, 65, 70, 75].map((length, index) => ({ tokens: prompt(length, 200 + index), maxTokens: 120 }));
    const expected: Answer[] = [];
    for (const request of requests) expected.push(await run(roomy, request));
    const { blockBytes } = roomy.runner.kv;
    await roomy.close();
    const tight = await openEngine({ ...base, kvBytes: blockBytes * 9 });
    expect(tight.runner.limits.numPages).toBe(9);
    const answers = await Promise.all(requests.map((request) => run(tight, request)));
    expect(tight.stats().preemptions).toBeGreaterThan(0);
    for (const [index, answer] of answers.entries()) expect(answer.ids).toEqual(expected[index]!.ids);
    expectClean(tight);
    await tight.close();
  });
});

describe("Engine with blocks from elsewhere", () => {
  it("takes another engine's blocks and answers with its bits; a missing one is recomputed", async () => {
    const shelf = new BlockShelf();
    const first = await openEngine(base, undefined, shelf);
    shelf.source = first;
    const tokens = prompt(150, 300);
    const cold = await run(first, { tokens, maxTokens: 30 });
    await shelf.settled();
    expect(shelf.payloads.size).toBe(4);
    await first.close();

    const second = await openEngine(base, undefined, shelf);
    const hit = await run(second, { tokens, maxTokens: 30 });
    expect(hit.finished.usage.sources).toEqual({ gpu: 0, peer: 0, cachestore: 128, computed: 22 });
    expect(hit.finished.usage.fetchedBytes).toBe(4 * second.runner.kv.blockBytes);
    expect(hit.ids).toEqual(cold.ids);
    expect(bits(hit)).toEqual(bits(cold));
    for (const [id, payload] of shelf.payloads) expect(await second.engine.readBlock(id)).toEqual(payload);
    await second.close();

    shelf.payloads.delete([...shelf.payloads.keys()][2]!);
    const third = await openEngine(base, undefined, shelf);
    const part = await run(third, { tokens, maxTokens: 30 });
    expect(part.finished.usage.sources).toMatchObject({ cachestore: 64, computed: 86 });
    expect(part.ids).toEqual(cold.ids);
    expect(bits(part)).toEqual(bits(cold));
    expectClean(third);
    await third.close();
  });
});
