import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { create } from "@bufbuild/protobuf";
import { type CachestoreServer, startCachestore } from "@kivimesh/cachestore";
import {
  blockIds,
  ClusterError,
  chainRoot,
  createClient,
  type Finished,
  Finished_Outcome,
  type GenerateJob,
  GenerateJobSchema,
  hex,
  type JobQueues,
  localMembership,
  pgliteJobQueues,
  type RpcClient,
  Worker,
} from "@kivimesh/proto";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { startWorker, type WorkerService } from "./worker.ts";

const engine = {
  dummyArchitecture: "tiny-llama",
  kvFormat: "kivi2r",
  blockTokens: 32,
  residualTokens: 32,
  maxSequences: 4,
  maxPrefillRows: 64,
  maxContextTokens: 2048,
  logLevel: "fatal",
};

function prompt(length: number, seed: number): number[] {
  return Array.from({ length }, (_, index) => (Math.imul(seed * 4099 + index + 1, 2_654_435_761) >>> 8) % 256);
}

type MessageInit = Partial<Omit<GenerateJob, "$typeName" | "$unknown">>;

let digestHex = "";

interface Answer {
  ids: number[];
  logits: Uint8Array;
  finished: Finished;
}

/** A gateway's side of one worker: a subscription and the jobs it waits for. */
class GatewayEnd {
  readonly client: RpcClient<typeof Worker>;
  readonly id: string;
  readonly held = new Set<string>();
  loads = 0;
  #answers = new Map<string, { answer: Answer; resolve: (answer: Answer) => void; onToken: (index: number) => void }>();
  #leave = new AbortController();
  #queues: JobQueues;
  #workerId: string;
  readonly subscribed: Promise<void>;

  constructor(worker: WorkerService, queues: JobQueues, id: string) {
    this.client = createClient(Worker, worker.address);
    this.#queues = queues;
    this.#workerId = worker.id;
    this.id = id;
    this.subscribed = new Promise((resolve) => {
      void this.#read(resolve);
    });
  }

  async #read(ready: () => void): Promise<void> {
    try {
      for await (const { event } of this.client.subscribe({ gatewayId: this.id }, { signal: this.#leave.signal })) {
        ready();
        if (event.case === "load") this.loads += 1;
        if (event.case === "prefix") {
          if (event.value.cleared) this.held.clear();
          for (const id of event.value.removed) this.held.delete(hex(id));
          for (const id of event.value.added) this.held.add(hex(id));
        }
        if (event.case === "tokens") {
          const entry = this.#answers.get(event.value.requestId);
          expect(event.value.index).toBe(entry?.answer.ids.length);
          entry?.answer.ids.push(...event.value.ids);
          if (event.value.index === 0 && entry) entry.answer.logits = event.value.firstLogits;
          entry?.onToken(event.value.index);
        }
        if (event.case === "finished") {
          const entry = this.#answers.get(event.value.requestId);
          if (entry) entry.answer.finished = event.value;
          entry?.resolve(entry.answer);
        }
      }
    } catch (error) {
      if (!(error instanceof ClusterError && ["CANCELLED", "UNAVAILABLE"].includes(error.code))) throw error;
    }
  }

  job(init: MessageInit & { requestId: string; tokens: number[] }): GenerateJob {
    return create(GenerateJobSchema, {
      epoch: 1,
      gatewayId: this.id,
      modelDigest: digestHex,
      promptTokens: init.tokens.length,
      maxTokens: 20,
      topP: 1,
      tenantNamespace: new Uint8Array(32).fill(7),
      returnFirstLogits: true,
      ...init,
    });
  }

  async run(job: GenerateJob, onToken: (index: number) => void = () => undefined): Promise<Answer> {
    const answer = { ids: [] as number[], logits: new Uint8Array(), finished: undefined as unknown as Finished };
    const done = new Promise<Answer>((resolve) => {
      this.#answers.set(job.requestId, { answer, resolve, onToken });
    });
    await this.#queues.enqueue(this.#workerId, job);
    return done;
  }

  async readBlock(id: string): Promise<Buffer> {
    const chunks: Uint8Array[] = [];
    for await (const { chunk } of this.client.readBlock({ blockId: Buffer.from(id, "hex") })) chunks.push(chunk);
    return Buffer.concat(chunks);
  }

  close(): void {
    this.#leave.abort();
    this.client.close();
  }
}

describe("two workers, a cachestore and a queue", () => {
  const membership = localMembership();
  let queues: JobQueues;
  let folder: string;
  let cachestore: CachestoreServer;
  let a: WorkerService;
  let b: WorkerService;
  let toA: GatewayEnd;
  let toB: GatewayEnd;

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "kivimesh-worker-test-"));
    queues = await pgliteJobQueues({});
    cachestore = await startCachestore({ dataDirectory: folder, membership, logLevel: "fatal" });
    a = await startWorker({ ...engine, id: "a", metricsPort: 0 }, { jobQueues: queues, membership });
    b = await startWorker({ ...engine, id: "b" }, { jobQueues: queues, membership });
    digestHex = hex(a.model.digest);
    toA = new GatewayEnd(a, queues, "gateway-1");
    toB = new GatewayEnd(b, queues, "gateway-1");
    await Promise.all([toA.subscribed, toB.subscribed]);
  });

  afterAll(async () => {
    toA?.close();
    toB?.close();
    await a?.close();
    await b?.close();
    await cachestore?.drain(0);
    await queues?.close();
    await rm(folder, { recursive: true, force: true });
  });

  async function expectNothingHeld(end: GatewayEnd): Promise<void> {
    const zero = { referencedPages: 0, runningSequences: 0, heldLeases: 0, activeJobs: 0, integrityViolations: [] };
    await expect.poll(() => end.client.getStats({}), { timeout: 5_000 }).toMatchObject(zero);
  }

  it("announces itself with its model", async () => {
    expect((await membership.list("worker")).map(({ id }) => id)).toEqual(["a", "b"]);
    const model = await toA.client.getModel({});
    expect(model).toMatchObject({ workerId: "a", kvFormat: "kivi2r", blockTokens: 32, contextTokens: 2048 });
    expect(JSON.parse(model.tokenizerJson)).toHaveProperty("model");
    expect(toA.loads).toBeGreaterThan(0);
  });

  it("takes the prefix that another worker computed, as the same bytes, and answers with its bits", async () => {
    const tokens = prompt(150, 1);
    const cold = await toA.run(toA.job({ requestId: "cold", tokens }));
    expect(cold.finished.outcome).toBe(Finished_Outcome.LENGTH);
    expect(cold.ids).toHaveLength(20);
    expect(cold.finished.usage?.kivimesh?.promptTokensBySource).toMatchObject({ computed: 150 });
    await expect.poll(() => a.transfers.publishedBlocks).toBe(4);

    const warm = await toB.run(toB.job({ requestId: "warm", tokens }));
    const { blockBytes } = b.model;
    expect(warm.finished.usage).toMatchObject({ promptTokens: 150, completionTokens: 20, cachedTokens: 128 });
    expect(warm.finished.usage?.kivimesh).toMatchObject({
      worker: "b",
      kvFormat: "kivi2r",
      fetchedBytes: 4n * blockBytes,
      promptTokensBySource: { gpu: 0, peer: 0, cachestore: 128, computed: 22 },
    });
    expect(warm.ids).toEqual(cold.ids);
    expect(warm.logits).toEqual(cold.logits);
    expect(warm.logits.length).toBe(4 * b.model.vocabulary);

    const { modelDigest, formatId } = { modelDigest: a.model.digest, formatId: a.model.kvFormatId };
    const parts = {
      modelDigest,
      formatId,
      blockTokens: 32,
      residualTokens: 32,
      tenantNamespace: new Uint8Array(32).fill(7),
    };
    const ids = blockIds(chainRoot(parts), tokens.slice(0, 128), 32).map(hex);
    await expect.poll(() => ids.every((id) => toA.held.has(id) && toB.held.has(id))).toBe(true);
    for (const id of ids) {
      const bytes = await toA.readBlock(id);
      expect(BigInt(bytes.length)).toBe(blockBytes);
      expect(await toB.readBlock(id)).toEqual(bytes);
    }
    await expect(toA.readBlock("00".repeat(32))).rejects.toMatchObject({ code: "KV_BLOCK_NOT_FOUND" });
    await expectNothingHeld(toA);
    await expectNothingHeld(toB);
  });

  it("ends a request on Abort, also on one that comes before its job", async () => {
    const job = toA.job({ requestId: "aborted", tokens: prompt(40, 2), maxTokens: 400 });
    const { finished, ids } = await toA.run(job, (index) => {
      if (index === 3) void toA.client.abort({ requestId: "aborted", epoch: 1 });
    });
    expect(finished.outcome).toBe(Finished_Outcome.ABORTED);
    expect(ids.length).toBeLessThan(400);
    await toA.client.abort({ requestId: "early", epoch: 1 });
    const early = await toA.run(toA.job({ requestId: "early", tokens: prompt(40, 2) }));
    expect(early).toMatchObject({ ids: [], finished: { outcome: Finished_Outcome.ABORTED } });
    await expectNothingHeld(toA);
  });

  it("fails a job of another model, of bad tokens, and one past its deadline, each with its code", async () => {
    const failing = async (requestId: string, init: MessageInit) => {
      const { finished } = await toA.run(toA.job({ requestId, tokens: prompt(40, 3), ...init }));
      expect(finished.outcome).toBe(Finished_Outcome.FAILED);
      return finished.errorCode;
    };
    expect(await failing("model", { modelDigest: "00" })).toBe("MODEL_MISMATCH");
    expect(await failing("tokens", { tokens: [1, 2, 400_000] })).toBe("INVALID_ARGUMENT");
    expect(await failing("late", { deadlineUnixMs: BigInt(Date.now() - 1) })).toBe("DEADLINE_EXCEEDED");
  });

  it("aborts the requests of a gateway that does not come back, and discards its queued jobs", async () => {
    const gone = new GatewayEnd(a, queues, "gateway-2");
    const before = (await a.stats()).decodeTokens;
    await gone.subscribed;
    let seen = 0;
    void gone.run(gone.job({ requestId: "orphan", tokens: prompt(40, 4), maxTokens: 2000 }), () => {
      if (++seen === 2) gone.close();
    });
    await expect.poll(() => seen, { timeout: 10_000 }).toBeGreaterThanOrEqual(2);
    await queues.enqueue("a", gone.job({ requestId: "nobody", tokens: prompt(40, 5) }));
    await expect.poll(() => a.stats(), { timeout: 10_000 }).toMatchObject({ running: 0, waiting: 0 });
    expect((await a.stats()).decodeTokens - before).toBeLessThan(1990);
    await expectNothingHeld(toA);
  });

  it("serves metrics and readiness", async () => {
    const text = await (await fetch(a.metricsUrl!)).text();
    expect(text).toMatch(/^kivimesh_kv_published_blocks_total\{worker="a"\} [1-9]/m);
    expect(text).toMatch(/^kivimesh_prompt_tokens_total\{source="computed",worker="a"\} [1-9]/m);
    expect(text).toMatch(/^kivimesh_worker_discarded_jobs_total\{worker="a"\} 1$/m);
    expect(text).toMatch(/^vllm:num_requests_running\{model_name="dummy-tiny-llama",worker="a"\} 0/m);
    expect((await fetch(a.metricsUrl!.replace("/metrics", "/readyz"))).status).toBe(200);
  });

  it("answers right when the cachestore goes away", async () => {
    const tokens = prompt(100, 6);
    const cold = await toA.run(toA.job({ requestId: "before", tokens }));
    await expect.poll(() => a.transfers.publishedBlocks).toBeGreaterThanOrEqual(7);
    await cachestore.drain(0);
    const without = await toB.run(toB.job({ requestId: "after", tokens }));
    expect(without.ids).toEqual(cold.ids);
    expect(without.finished.usage?.kivimesh?.promptTokensBySource).toMatchObject({ cachestore: 0, computed: 100 });
    await expectNothingHeld(toB);
  });

  it("drains: finishes what runs, refuses what comes, leaves the membership", async () => {
    const running = toB.run(toB.job({ requestId: "last", tokens: prompt(40, 7), maxTokens: 60 }), (index) => {
      if (index === 1) draining ??= b.drain(20_000);
    });
    let draining: Promise<void> | undefined;
    await expect.poll(() => draining !== undefined, { timeout: 10_000 }).toBe(true);
    expect(b.ready()).toBe(false);
    const refused = toB.run(toB.job({ requestId: "refused", tokens: prompt(40, 8) }));
    expect((await refused).finished).toMatchObject({ outcome: Finished_Outcome.FAILED, errorCode: "WORKER_DRAINING" });
    const last = await running;
    expect(last.finished.outcome).toBe(Finished_Outcome.LENGTH);
    expect(last.ids).toHaveLength(60);
    await draining;
    expect((await membership.list("worker")).map(({ id }) => id)).toEqual(["a"]);
  });
});
