import { afterEach, describe, expect, it } from "vitest";
import type { EngineConfig } from "./config.ts";
import { Engine } from "./engine.ts";
import type { FinishedEvent, GenerationEvent, GenerationRequest } from "./generation.ts";
import { greedySampling } from "./generation.ts";
import type { ModelRunner, StepPlan } from "./model/index.ts";
import { type EngineParts, openEngine, openEngineParts, type SimpleGeneration } from "./open-engine.ts";

const base: EngineConfig = {
  dummyArchitecture: "tiny-llama",
  blockTokens: 32,
  residualTokens: 32,
  maxSequences: 4,
  maxPrefillRows: 64,
  maxContextTokens: 512,
};

const closers: (() => Promise<void>)[] = [];

afterEach(async () => {
  for (const close of closers.splice(0)) await close();
});

function prompt(length: number, seed: number): number[] {
  return Array.from({ length }, (_, index) => (Math.imul(seed * 4099 + index + 1, 2_654_435_761) >>> 8) % 256);
}

/** Opens an engine for each configuration and runs the same requests on it, one after the other. */
async function answers(config: EngineConfig, requests: readonly SimpleGeneration[]) {
  const open = await openEngine(config);
  const results: { ids: number[]; logits: number[]; finished: FinishedEvent }[] = [];
  for (const request of requests) {
    const ids: number[] = [];
    let logits: number[] = [];
    for await (const event of open.generate({ ...request, returnFirstLogits: true })) {
      if (event.type === "finished") results.push({ ids, logits, finished: event });
      else ids.push(...event.ids);
      if (event.type === "tokens" && event.firstLogits) logits = [...event.firstLogits];
    }
  }
  expect(open.engine.checkIntegrity()).toEqual([]);
  await open.close();
  return results;
}

describe("Engine variants", () => {
  it("gives the same bits whatever the size of the prefill chunks", async () => {
    const request = { tokens: prompt(150, 1), maxTokens: 8 };
    const [[small], [middle], [large]] = (await Promise.all(
      [32, 64, 256].map((maxPrefillRows) => answers({ ...base, maxPrefillRows }, [request])),
    )) as [
      Awaited<ReturnType<typeof answers>>,
      Awaited<ReturnType<typeof answers>>,
      Awaited<ReturnType<typeof answers>>,
    ];
    expect(middle).toMatchObject({ ids: small!.ids, logits: small!.logits });
    expect(large).toMatchObject({ ids: small!.ids, logits: small!.logits });
    expect(small!.logits.length).toBeGreaterThan(300);
  });

  const shapes: EngineConfig[] = [
    { kvFormat: "f16" },
    { kvFormat: "kivi4" },
    { kvFormat: "kivi2", residualTokens: 128, maxPrefillRows: 128 },
    { kvFormat: "kivi2r", blockTokens: 64, residualTokens: 64, dummyArchitecture: "tiny-llama-mha" },
    { kvFormat: "kivi2r", dummyArchitecture: "tiny-llama-mqa" },
  ];

  for (const shape of shapes) {
    it(`hits equal misses with ${JSON.stringify(shape)}`, async () => {
      const config = { ...base, ...shape };
      const request = { tokens: prompt(200, 2), maxTokens: 12 };
      const [miss, hit] = await answers(config, [request, request]);
      const { residualTokens } = config;
      expect(hit!.finished.usage.sources.gpu).toBe(Math.floor(199 / residualTokens!) * residualTokens!);
      expect(hit!.ids).toEqual(miss!.ids);
      expect(hit!.logits).toEqual(miss!.logits);
    });
  }

  it("shares blocks sealed while decoding under fast numerics only", async () => {
    const first = { tokens: prompt(40, 3), maxTokens: 100 };
    for (const numerics of ["invariant", "fast"] as const) {
      const open = await openEngine({ ...base, numerics });
      const ids: number[] = [];
      for await (const event of open.generate(first)) if (event.type === "tokens") ids.push(...event.ids);
      let usage: FinishedEvent["usage"] | undefined;
      for await (const event of open.generate({ tokens: [...first.tokens, ...ids, 1, 2, 3], maxTokens: 1 })) {
        if (event.type === "finished") usage = event.usage;
      }
      expect(usage?.sources.gpu).toBe(numerics === "fast" ? 128 : 32);
      await open.close();
    }
  });
});

/** An engine over a runner that a test changes. */
async function engineOver(change: (runner: ModelRunner) => Partial<ModelRunner>) {
  const parts: EngineParts = await openEngineParts(base);
  const { runner } = parts.options;
  const changed: ModelRunner = {
    config: runner.config,
    kv: runner.kv,
    limits: runner.limits,
    device: runner.device,
    lost: runner.lost,
    step: (plan) => runner.step(plan),
    readBlock: (page) => runner.readBlock(page),
    writeBlock: (page, payload) => runner.writeBlock(page, payload),
    memory: () => runner.memory(),
    close: () => runner.close(),
    ...change(runner),
  };
  const events: GenerationEvent[] = [];
  const failures: Error[] = [];
  const engine = new Engine({
    ...parts.options,
    runner: changed,
    onEvents: (some) => events.push(...some),
    onFailure: (error) => failures.push(error),
  });
  closers.push(async () => {
    await engine.close();
    await parts.gpu.close();
  });
  const finished = async (requestId: string): Promise<FinishedEvent> => {
    const find = () => events.find((event) => event.type === "finished" && event.requestId === requestId);
    await expect.poll(find, { timeout: 20_000 }).toBeDefined();
    return find() as FinishedEvent;
  };
  return { engine, events, failures, finished };
}

function request(requestId: string, init: Partial<GenerationRequest> = {}): GenerationRequest {
  const tokens = init.tokens ?? Uint32Array.from(prompt(70, 5));
  return {
    requestId,
    epoch: 0,
    tokens,
    promptTokens: tokens.length,
    maxTokens: 4,
    sampling: greedySampling,
    stopTokenIds: [],
    tenantNamespace: new Uint8Array(32),
    deadlineUnixMs: 0,
    returnFirstLogits: false,
    ...init,
  };
}

describe("Engine over a failing runner", () => {
  it("fails the sequence whose KV is not finite, and neither shares its blocks nor stops the others", async () => {
    const spoilt = 200;
    const { engine, finished } = await engineOver((runner) => ({
      async step(plan: StepPlan) {
        const result = await runner.step(plan);
        const bad = plan.prefill.filter(({ tokens }) => tokens[0] === spoilt).map(({ slot }) => slot);
        return { ...result, nonFiniteSlots: [...result.nonFiniteSlots, ...bad] };
      },
    }));
    engine.submit(request("bad", { tokens: Uint32Array.from([spoilt, ...prompt(69, 6)]) }));
    engine.submit(request("good"));
    expect(await finished("bad")).toMatchObject({ outcome: "failed", error: { code: "KV_NOT_FINITE" } });
    expect(await finished("good")).toMatchObject({ outcome: "length" });
    // Two windows of the good one; none of the bad one.
    expect(engine.indexedBlocks()).toHaveLength(2);
    expect(engine.stats()).toMatchObject({ running: 0, referencedPages: 0, integrityViolations: [] });
  });

  it("fails everything when a step fails, and refuses what comes later", async () => {
    const { engine, failures, finished } = await engineOver(() => ({
      step: () => Promise.reject(new Error("the driver is gone")),
    }));
    engine.submit(request("running"));
    expect(await finished("running")).toMatchObject({ outcome: "failed", error: { code: "WORKER_LOST" } });
    expect(failures).toHaveLength(1);
    engine.submit(request("later"));
    expect(await finished("later")).toMatchObject({ outcome: "failed", error: { code: "WORKER_LOST" } });
    expect(engine.stats()).toMatchObject({ running: 0, referencedPages: 0, integrityViolations: [] });
  });

  it("drains: what has begun ends, what has not is refused", async () => {
    const { engine, finished } = await engineOver(() => ({}));
    for (let index = 0; index < 6; index++) {
      engine.submit(request(`r${index}`, { tokens: Uint32Array.from(prompt(40, 10 + index)), maxTokens: 60 }));
    }
    await expect.poll(() => engine.stats().running, { timeout: 20_000, interval: 1 }).toBe(4);
    engine.drain();
    const ends = await Promise.all(Array.from({ length: 6 }, (_, index) => finished(`r${index}`)));
    expect(ends.map(({ outcome }) => outcome)).toEqual(["length", "length", "length", "length", "failed", "failed"]);
    expect(ends[5]!.error?.code).toBe("WORKER_DRAINING");
    engine.submit(request("late"));
    expect((await finished("late")).error?.code).toBe("WORKER_DRAINING");
  });

  it("fails a request whose deadline passes while it runs", async () => {
    const { engine, finished, events } = await engineOver((runner) => ({
      async step(plan: StepPlan) {
        await new Promise((resolve) => setTimeout(resolve, 50));
        return runner.step(plan);
      },
    }));
    engine.submit(request("late", { maxTokens: 400, deadlineUnixMs: Date.now() + 800 }));
    expect(await finished("late")).toMatchObject({ outcome: "failed", error: { code: "DEADLINE_EXCEEDED" } });
    expect(events.some(({ type }) => type === "tokens")).toBe(true);
    expect(engine.stats()).toMatchObject({ running: 0, referencedPages: 0, integrityViolations: [] });
  });
});
