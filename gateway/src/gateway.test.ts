/** What clients see when parts of the cluster fail, drain or overflow. */
import { setTimeout as delay } from "node:timers/promises";
import { create } from "@bufbuild/protobuf";
import { GenerateJobSchema, type JobQueues, pgliteJobQueues } from "@kivimesh/proto";
import OpenAI from "openai";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { GatewayConfig } from "./config.ts";
import { startGateway } from "./gateway.ts";
import { ask, client, codeOf, messages, stream } from "./testing/chat-client.ts";
import { metric, TestCluster, until } from "./testing/cluster.ts";
import { freezingProxy } from "./testing/freezing-proxy.ts";

const answer = "The quick 🦊 jumps over the lazy dog, and then it does so again.";

let queues: JobQueues;
let cluster: TestCluster | undefined;

beforeAll(async () => {
  queues = await pgliteJobQueues();
});

afterAll(() => queues.close());

afterEach(async () => {
  await cluster?.[Symbol.asyncDispose]();
  cluster = undefined;
});

/** Workers of these ids, in that order of preference for an idle cluster, and a gateway. */
async function start(ids: readonly string[], config: GatewayConfig = {}) {
  cluster = await TestCluster.start(queues);
  const workers = [];
  for (const id of ids) workers.push(await cluster.worker(id, { behaviour: { answer } }));
  const gateway = await cluster.gateway(config);
  return { cluster, workers, gateway };
}

describe("a worker that fails", () => {
  it("is replaced in the middle of a stream: same text, each token once, next epoch with the tokens so far", async () => {
    const { workers, gateway } = await start(["a", "b"]);
    const [first, second] = workers;
    first!.behaviour.pauseAt = 20;
    const { state, done } = stream(gateway, {});
    await until("text", () => state.text.length > 10);
    const started = Date.now();
    await first!.crash();
    await done;
    expect(Date.now() - started).toBeLessThan(2_000);
    expect(state.text).toBe(answer);
    const [job, resumed] = [first!.jobs[0], second!.jobs[0]];
    expect(resumed).toMatchObject({
      requestId: job?.requestId,
      epoch: 2,
      promptTokens: job?.promptTokens,
      seed: job?.seed,
    });
    const kept = (resumed?.tokens.length ?? 0) - (job?.promptTokens ?? 0);
    expect(kept).toBeGreaterThan(0);
    expect(kept).toBeLessThanOrEqual(20);
    expect(resumed?.maxTokens).toBe((job?.maxTokens ?? 0) - kept);
    expect(state.usage).toMatchObject({ prompt_tokens: job?.promptTokens, kivimesh: { worker: "b" } });
    expect(state.usage?.completion_tokens).toBeGreaterThan(60);
    expect(await metric(gateway, 'kivimesh_gateway_requeues_total{reason="worker_lost"}')).toBe(1);
  });

  it("ends in an error event, never a bare cut, where no other takes over in time", async () => {
    const { workers, gateway } = await start(["a"], { limits: { workerWaitMs: 300 } });
    workers[0]!.behaviour.pauseAt = 20;
    const { state, done } = stream(gateway);
    await until("text", () => state.text.length > 10);
    await workers[0]!.crash();
    await expect(done).rejects.toThrow(/worker a was lost/);
    expect(answer.startsWith(state.text)).toBe(true);
  });

  it("that stops answering without closing its connection is left too", async () => {
    cluster = await TestCluster.start(queues);
    const first = await cluster.worker("a", { behaviour: { answer, pauseAt: 20 } });
    const proxy = await freezingProxy(first.address);
    await first.announce(proxy.address);
    const second = await cluster.worker("b", { behaviour: { answer } });
    const gateway = await cluster.gateway({ limits: { keepaliveMs: 200, keepaliveTimeoutMs: 300 } });
    const { state, done } = stream(gateway, {});
    await until("text", () => state.text.length > 10);
    expect(first.jobs).toHaveLength(1);
    const frozen = Date.now();
    proxy.freeze();
    await done;
    expect(Date.now() - frozen).toBeLessThan(2_000);
    expect(state.text).toBe(answer);
    expect(second.jobs[0]?.epoch).toBe(2);
    proxy.close();
  });

  it("may repeat, delay and lose messages: the client sees each token once", async () => {
    const { workers, gateway } = await start(["a"]);
    Object.assign(workers[0]!.behaviour, { repeats: true, skipIndex: 31 });
    const { state, done } = stream(gateway);
    await done;
    expect(state.text).toBe(answer);
    expect(workers[0]!.jobs.map((job) => job.epoch)).toEqual([1, 2]);
    expect(await metric(gateway, 'kivimesh_gateway_requeues_total{reason="gap"}')).toBe(1);
  });

  it("may lose messages of a request that has all it wants: it ends, and moves nowhere", async () => {
    const { workers, gateway } = await start(["a", "b"]);
    const [worker] = workers;
    Object.assign(worker!.behaviour, { pauseAt: 20, skipIndex: 21, ignoresAborts: true });
    const body = { model: "scripted", messages, stop: ["quick"] };
    const answered = client(gateway).chat.completions.create(body, { headers: { "x-kivimesh-worker": "a" } });
    await until("the abort", () => worker!.aborts.length > 0);
    worker!.behaviour.pauseAt = Number.POSITIVE_INFINITY;
    expect((await answered).choices[0]).toMatchObject({ message: { content: "The " }, finish_reason: "stop" });
    expect(workers.map((each) => each.jobs.length)).toEqual([1, 0]);
    expect(await metric(gateway, 'kivimesh_gateway_requeues_total{reason="gap"}')).toBeUndefined();
  });

  it("and refuses a job for its own reasons is avoided; when all refuse, the client gets the reason", async () => {
    const { workers, gateway } = await start(["a", "b"]);
    workers[0]!.behaviour.failure = "PAGE_POOL_EXHAUSTED";
    expect((await ask(gateway)).status).toBe(200);
    expect(workers[1]!.jobs[0]?.epoch).toBe(2);
    workers[1]!.behaviour.failure = "PAGE_POOL_EXHAUSTED";
    const refused = await ask(gateway);
    expect([refused.status, await codeOf(refused)]).toEqual([429, "page_pool_exhausted"]);
    expect(refused.headers.get("retry-after")).toBe("1");
  });

  it("again and again: of many streams each gets its whole text once", async () => {
    const { cluster, gateway } = await start(["w0", "w1", "w2"], { limits: { maxAttempts: 20 } });
    for (const worker of cluster.workers) Object.assign(worker.behaviour, { repeats: true, delayMs: 15 });
    const streams = Array.from({ length: 24 }, () => stream(gateway));
    for (let round = 0; round < 3; round++) {
      await delay(150);
      const [oldest] = cluster.workers.splice(0, 1);
      await oldest?.crash();
      await oldest?.withdraw();
      const behaviour = { answer, repeats: true, delayMs: 15, skipIndex: 40 + round };
      await cluster.worker(`w${3 + round}`, { behaviour });
    }
    await Promise.all(streams.map((one) => one.done));
    expect(new Set(streams.map((one) => one.state.text))).toEqual(new Set([answer]));
    expect(new Set(streams.map((one) => one.state.usage?.completion_tokens)).size).toBe(1);
    expect(await metric(gateway, 'kivimesh_gateway_requeues_total{reason="worker_lost"}')).toBeGreaterThan(3);
    await cluster.quiet();
  });

  it("comes back under the same id at another address", async () => {
    const { cluster, workers, gateway } = await start(["a"]);
    await workers[0]!.close();
    await until("no worker", async () => (await metric(gateway, "kivimesh_gateway_workers")) === 0);
    const refused = await ask(gateway);
    expect([refused.status, await codeOf(refused)]).toEqual([503, "no_worker"]);
    expect((await fetch(`${gateway.httpUrl}/readyz`)).status).toBe(503);
    await cluster.worker("a", { behaviour: { answer } });
    await cluster.seen(gateway, 1);
    expect((await ask(gateway)).status).toBe(200);
  });
});

describe("draining", () => {
  it("a worker: its running streams go on, new requests go elsewhere", async () => {
    const { workers, gateway } = await start(["a", "b"]);
    workers[0]!.behaviour.pauseAt = 20;
    const { state, done } = stream(gateway, { pin: "a" });
    await until("text", () => state.text.length > 10);
    await workers[0]!.withdraw();
    await until("one worker", async () => (await metric(gateway, "kivimesh_gateway_workers")) === 1);
    expect((await ask(gateway)).status).toBe(200);
    expect(workers[1]!.jobs).toHaveLength(1);
    await delay(500);
    workers[0]!.behaviour.pauseAt = Number.POSITIVE_INFINITY;
    await done;
    expect(state.text).toBe(answer);
    expect(workers[0]!.jobs).toHaveLength(1);
  });

  it("the gateway: not ready, new requests refused, running ones finish", async () => {
    const { workers, gateway } = await start(["a"]);
    workers[0]!.behaviour.pauseAt = 20;
    const { state, done } = stream(gateway);
    await until("text", () => state.text.length > 10);
    const drained = gateway.drain(5_000);
    expect((await fetch(`${gateway.httpUrl}/readyz`)).status).toBe(503);
    const refused = await ask(gateway);
    expect([refused.status, await codeOf(refused)]).toEqual([503, "gateway_draining"]);
    workers[0]!.behaviour.pauseAt = Number.POSITIVE_INFINITY;
    await done;
    expect(state.text).toBe(answer);
    await drained;
    await expect(fetch(`${gateway.httpUrl}/healthz`)).rejects.toThrow();
  });

  it("the gateway: what does not finish in time ends with an error event, at the worker too", async () => {
    const { workers, gateway } = await start(["a"]);
    workers[0]!.behaviour.pauseAt = 20;
    const { state, done } = stream(gateway);
    await until("text", () => state.text.length > 10);
    const started = Date.now();
    await gateway.drain(100);
    expect(Date.now() - started).toBeLessThan(2_500);
    await expect(done).rejects.toThrow(/shutting down/);
    await until("the abort", () => workers[0]!.aborts.length > 0);
  });
});

describe("queues of workers", () => {
  it("that are gone for good are removed, whoever left them; those of live ones stay", async () => {
    await queues.enqueue("ghost", create(GenerateJobSchema, { requestId: "r", epoch: 1, tokens: [1, 2, 3] }));
    const { workers, gateway } = await start(["a"], { limits: { queueGraceMs: 300 } });
    expect((await ask(gateway)).status).toBe(200);
    expect(await queues.workerIds()).toEqual(expect.arrayContaining(["a", "ghost"]));
    await until("no queue of the ghost", async () => !(await queues.workerIds()).includes("ghost"));
    await delay(500);
    expect(await queues.workerIds()).toContain("a");
    expect((await ask(gateway)).status).toBe(200);
    await workers[0]!.close();
    await until("no queue of the worker", async () => !(await queues.workerIds()).includes("a"));
  });
});

describe("limits", () => {
  it("refuses requests over the limit with 429 and Retry-After", async () => {
    const { workers, gateway } = await start(["a"], { limits: { maxRequests: 2 } });
    workers[0]!.behaviour.pauseAt = 2;
    const running = [stream(gateway), stream(gateway)];
    await until("two jobs", () => workers[0]!.jobs.length === 2);
    const refused = await client(gateway)
      .chat.completions.create({ model: "scripted", messages })
      .catch((error: unknown) => error);
    expect(refused).toBeInstanceOf(OpenAI.RateLimitError);
    expect(refused).toMatchObject({ status: 429, code: "queue_full" });
    workers[0]!.behaviour.pauseAt = Number.POSITIVE_INFINITY;
    await Promise.all(running.map((one) => one.done));
    expect((await ask(gateway)).status).toBe(200);
  });

  it("counts what all gateways have put into the queues", async () => {
    cluster = await TestCluster.start(queues);
    const worker = await cluster.worker("a", { concurrency: 1, behaviour: { answer, pauseAt: 2 } });
    const other = await cluster.gateway();
    const gateway = await cluster.gateway({ limits: { maxQueuedJobs: 2 } });
    const running = [stream(other), stream(other), stream(other)];
    await until("a full queue", async () => (await metric(gateway, "kivimesh_queue_jobs_waiting")) === 2);
    expect((await ask(gateway)).status).toBe(429);
    worker.behaviour.pauseAt = Number.POSITIVE_INFINITY;
    await Promise.all(running.map((one) => one.done));
  });

  it("ends a request at its deadline, at the worker too", async () => {
    const { workers, gateway } = await start(["a"], { limits: { requestTimeoutMs: 300 } });
    workers[0]!.behaviour.pauseAt = 2;
    const late = await ask(gateway);
    expect([late.status, await codeOf(late)]).toEqual([504, "deadline_exceeded"]);
    await until("the abort", () => workers[0]!.aborts.length > 0);
  });

  it("refuses listeners and settings that are not allowed, by name", async () => {
    cluster = await TestCluster.start(queues);
    const seams = { jobQueues: cluster.jobQueues, membership: cluster.membership };
    await expect(startGateway({ host: "0.0.0.0" }, seams)).rejects.toThrow(/cluster secret/);
    const open = { host: "0.0.0.0", clusterSecret: "long enough" };
    await expect(startGateway(open, seams)).rejects.toThrow(/TLS/);
    await expect(startGateway({ httpPort: 70_000 }, seams)).rejects.toThrow(/httpPort/);
    await expect(startGateway({ limits: { maxRequests: 0 } }, seams)).rejects.toThrow(/maxRequests/);
  });
});

it("names the port that is taken", async () => {
  const { cluster, gateway } = await start([]);
  const seams = { jobQueues: cluster.jobQueues, membership: cluster.membership };
  const [httpPort, grpcPort] = [new URL(gateway.httpUrl).port, gateway.grpcAddress.split(":")[1]].map(Number);
  const quiet = { logLevel: "silent" } as const;
  await expect(startGateway({ ...quiet, httpPort: httpPort ?? 0 }, seams)).rejects.toMatchObject({
    code: "INVALID_ARGUMENT",
    parameter: "httpPort",
    message: expect.stringMatching(/taken/),
  });
  await expect(startGateway({ ...quiet, grpcPort: grpcPort ?? 0 }, seams)).rejects.toMatchObject({
    code: "INVALID_ARGUMENT",
    parameter: "grpcPort",
    message: expect.stringMatching(/taken/),
  });
});

describe("routing", () => {
  it("goes to the worker that holds the prompt's prefix", async () => {
    const { workers, gateway } = await start(["a", "b"]);
    const content = "A long shared prefix that fills some blocks of thirty-two tokens each. ".repeat(3);
    const body = { model: "scripted", messages: [{ role: "user" as const, content }] };
    await client(gateway).chat.completions.create(body, { headers: { "x-kivimesh-worker": "b" } });
    const job = workers[1]!.jobs[0];
    workers[1]!.hold(job?.tokens ?? [], job?.tenantNamespace ?? new Uint8Array(32));
    await until("held blocks", async () => {
      const state = (await (await fetch(`${gateway.httpUrl}/dashboard.json`)).json()) as {
        workers: { heldBlocks: number }[];
      };
      return state.workers.some((worker) => worker.heldBlocks > 3);
    });
    await client(gateway).chat.completions.create(body);
    expect(workers.map((worker) => worker.jobs.length)).toEqual([0, 2]);
    await client(gateway).chat.completions.create({ ...body, cache_salt: "mine" } as typeof body);
    expect(workers.map((worker) => worker.jobs.length)).toEqual([1, 2]);
  });
});
