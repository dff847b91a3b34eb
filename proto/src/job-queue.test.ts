import { mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Queue } from "bullmq";
import { Redis } from "ioredis";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type GenerateJob, GenerateJobSchema } from "./gen/kivimesh/v1/worker_pb.ts";
import { type JobConsumer, type JobQueues, jobQueuesOver, queueOptions } from "./job-queue.ts";
import { createLogger } from "./logging.ts";
import { pgliteJobQueues } from "./postgres-job-queues.ts";
import { redisJobQueues } from "./redis-job-queues.ts";
import { type RedisServer, startRedis } from "./testing/redis-server.ts";

const logger = createLogger("test", "silent");
let redis: RedisServer;

beforeAll(async () => {
  redis = await startRedis();
});

afterAll(() => redis.stop());

type JobFields = Exclude<MessageInitShape<typeof GenerateJobSchema>, GenerateJob>;

function job(requestId: string, more: JobFields = {}): GenerateJob {
  return create(GenerateJobSchema, { requestId, epoch: 1, gatewayId: "g", tokens: [1, 2, 0xffff_ffff], ...more });
}

function deferred(): { promise: Promise<void>; resolve: () => void } {
  let resolve = () => {};
  const promise = new Promise<void>((done) => {
    resolve = done;
  });
  return { promise, resolve };
}

const backends: [string, () => Promise<JobQueues>][] = [
  ["Redis", async () => redisJobQueues({ url: redis.url, logger })],
  ["PGlite", () => pgliteJobQueues({ logger })],
];

// Every backend keeps the same promises.
describe.each(backends)("%s job queues", (_, open) => {
  let queues: JobQueues;
  beforeAll(async () => {
    queues = await open();
  });
  afterAll(() => queues.close());

  it("deliver a job whole to the worker it names", async () => {
    const received: GenerateJob[] = [];
    const consumer = await queues.consume("a", async (each) => void received.push(each), { concurrency: 4 });
    const other = await queues.consume("b", async () => expect.unreachable(), { concurrency: 4 });
    const sent = job("whole", {
      promptTokens: 3,
      temperature: 0.5,
      seed: 2n ** 63n,
      tenantNamespace: new Uint8Array(32).fill(9),
      deadlineUnixMs: -1n,
    });
    await queues.enqueue("a", sent);
    await expect.poll(() => received).toEqual([sent]);
    await expect.poll(() => queues.counts("a")).toEqual({ waiting: 0, active: 0 });
    await Promise.all([consumer.close(), other.close()]);
  });

  it("keep jobs for a worker that comes later, in order and by priority", async () => {
    for (const [index, priority] of [5, 0, 1, 0].entries()) {
      await queues.enqueue("late", job(`p${index}`), { priority });
    }
    expect(await queues.counts("late")).toEqual({ waiting: 4, active: 0 });
    const received: string[] = [];
    const handler = async (each: GenerateJob) => void received.push(each.requestId);
    const consumer = await queues.consume("late", handler, { concurrency: 1 });
    await expect.poll(() => received).toEqual(["p1", "p3", "p2", "p0"]);
    await consumer.close();
  });

  it("queue the same request and epoch once, the next epoch again", async () => {
    await queues.enqueue("once", job("r"));
    await queues.enqueue("once", job("r"));
    await queues.enqueue("once", job("r", { epoch: 2 }));
    expect((await queues.counts("once")).waiting).toBe(2);
  });

  it("remove what waits, and not what runs", async () => {
    const gate = deferred();
    await queues.enqueue("rm", job("waits"));
    expect(await queues.remove("rm", "waits", 2)).toBe(false);
    expect(await queues.remove("rm", "waits", 1)).toBe(true);
    expect(await queues.remove("rm", "waits", 1)).toBe(false);
    expect(await queues.counts("rm")).toEqual({ waiting: 0, active: 0 });
    const consumer = await queues.consume("rm", () => gate.promise, { concurrency: 1 });
    await queues.enqueue("rm", job("runs"));
    await expect.poll(() => consumer.activeJobs()).toBe(1);
    await expect(queues.remove("rm", "runs", 1)).resolves.toBe(false);
    gate.resolve();
    await consumer.close();
  });

  it("run as many at once as allowed, and count them", async () => {
    const gate = deferred();
    const consumer = await queues.consume("many", () => gate.promise, { concurrency: 3 });
    await Promise.all(Array.from({ length: 5 }, (_, index) => queues.enqueue("many", job(`m${index}`))));
    await expect.poll(() => consumer.activeJobs()).toBe(3);
    await expect.poll(() => queues.counts("many")).toEqual({ waiting: 2, active: 3 });
    gate.resolve();
    await expect.poll(() => queues.counts("many")).toEqual({ waiting: 0, active: 0 });
    await consumer.close();
  });

  it("forget a job that fails, and never run it again", async () => {
    let runs = 0;
    const handler = async () => {
      runs++;
      throw new Error("on purpose");
    };
    const consumer = await queues.consume("fails", handler, { concurrency: 1 });
    await queues.enqueue("fails", job("f"));
    await expect.poll(() => runs).toBe(1);
    await expect.poll(() => queues.counts("fails")).toEqual({ waiting: 0, active: 0 });
    // The same id may be used again: nothing of it was kept.
    await queues.enqueue("fails", job("f"));
    await expect.poll(() => runs).toBe(2);
    await consumer.close();
  });

  it("pause without stopping what runs", async () => {
    const gate = deferred();
    let started = 0;
    const handler = () => {
      started++;
      return gate.promise;
    };
    const consumer = await queues.consume("pause", handler, { concurrency: 8 });
    await queues.enqueue("pause", job("first"));
    await expect.poll(() => consumer.activeJobs()).toBe(1);
    await consumer.pause();
    await queues.enqueue("pause", job("second"));
    await new Promise((resolve) => setTimeout(resolve, 300));
    expect(started).toBe(1);
    expect(await queues.counts("pause")).toEqual({ waiting: 1, active: 1 });
    gate.resolve();
    await consumer.close();
    expect((await queues.counts("pause")).waiting).toBe(1);
  });

  it("abort what runs when the consumer closes, and wait for it", async () => {
    const events: string[] = [];
    const handler = async (_: GenerateJob, signal: AbortSignal) => {
      await new Promise((resolve) => signal.addEventListener("abort", resolve));
      events.push("handler ended");
    };
    const consumer = await queues.consume("close", handler, { concurrency: 1 });
    await queues.enqueue("close", job("c"));
    await expect.poll(() => consumer.activeJobs()).toBe(1);
    await consumer.close();
    events.push("closed");
    expect(events).toEqual(["handler ended", "closed"]);
    expect(consumer.activeJobs()).toBe(0);
  });

  it("forget all of a worker, name those that are left, and serve it again when it comes back", async () => {
    await queues.enqueue("gone", job("waits"));
    await queues.enqueue("stays", job("waits"));
    expect(await queues.workerIds()).toEqual(expect.arrayContaining(["gone", "stays"]));
    await queues.forget("gone");
    const left = await queues.workerIds();
    expect(left).toContain("stays");
    expect(left).not.toContain("gone");
    const received: string[] = [];
    const consumer = await queues.consume("gone", async (each) => void received.push(each.requestId), {
      concurrency: 1,
    });
    await queues.enqueue("gone", job("anew"));
    await expect.poll(() => received).toEqual(["anew"]);
    await consumer.close();
  });

  it("take 200 jobs through in a few seconds", async () => {
    let done = 0;
    const consumer = await queues.consume("fast", async () => void done++, { concurrency: 16 });
    const before = performance.now();
    await Promise.all(Array.from({ length: 200 }, (_, index) => queues.enqueue("fast", job(`q${index}`))));
    await expect.poll(() => done, { timeout: 20_000, interval: 10 }).toBe(200);
    console.log(`200 jobs in ${Math.round(performance.now() - before)} ms`);
    expect(performance.now() - before).toBeLessThan(10_000);
    await consumer.close();
  });

  it("refuse ids and priorities that are not allowed", async () => {
    const code = "INVALID_ARGUMENT";
    await expect(queues.enqueue("a:b", job("x"))).rejects.toMatchObject({ code });
    await expect(queues.enqueue("a", job("x:y"))).rejects.toMatchObject({ code });
    await expect(queues.enqueue("a", job("x"), { priority: -1 })).rejects.toMatchObject({ code });
    await expect(queues.ping()).resolves.toBeUndefined();
  });
});

describe("the sending ends of queues", () => {
  it("are closed when nobody uses them, and open again", async () => {
    const connection = new Redis(redis.url);
    const open = new Set<string>();
    const queueNamed = (name: string) => {
      const queue = new Queue(name, { ...queueOptions, connection });
      open.add(name);
      const close = queue.close.bind(queue);
      queue.close = async () => {
        open.delete(name);
        await close();
      };
      return queue;
    };
    const store = {
      queue: queueNamed,
      worker: () => expect.unreachable(),
      names: async () => [],
      ping: () => connection.ping(),
      close: async () => connection.disconnect(),
    };
    const queues = jobQueuesOver(store, logger, 100);
    await queues.enqueue("idle-a", job("a"));
    await queues.enqueue("idle-b", job("b"));
    expect([...open]).toEqual(["kivimesh-worker-idle-a", "kivimesh-worker-idle-b"]);
    await new Promise((resolve) => setTimeout(resolve, 150));
    expect(await queues.counts("idle-b")).toEqual({ waiting: 1, active: 0 });
    await queues.ping();
    expect([...open]).toEqual(["kivimesh-worker-idle-b"]);
    await queues.close();
    expect(open.size).toBe(0);
  });
});

describe("Redis that goes away", () => {
  it("fails operations in time, loses no job, and comes back by itself", async () => {
    const own = await startRedis();
    const queues = redisJobQueues({ url: own.url, logger });
    let consumer: JobConsumer | undefined;
    try {
      await queues.enqueue("w", job("kept"));
      // The append-only file is synced once a second.
      await new Promise((resolve) => setTimeout(resolve, 1_200));
      await own.kill();
      const before = performance.now();
      const refused = expect(queues.enqueue("w", job("refused"))).rejects.toMatchObject({
        code: "QUEUE_UNAVAILABLE",
        retryAfterMs: expect.any(Number),
      });
      await expect(queues.ping()).rejects.toMatchObject({ code: "QUEUE_UNAVAILABLE" });
      await refused;
      expect(performance.now() - before).toBeLessThan(5_000);
      await own.restart();
      await expect
        .poll(
          () =>
            queues.ping().then(
              () => "up",
              () => "down",
            ),
          { timeout: 10_000 },
        )
        .toBe("up");
      const received: string[] = [];
      consumer = await queues.consume("w", async (each) => void received.push(each.requestId), { concurrency: 1 });
      await queues.enqueue("w", job("after"));
      await expect.poll(() => received, { timeout: 10_000 }).toEqual(["kept", "after"]);
      // A consumer outlives an outage too.
      await own.kill();
      await own.restart();
      await expect
        .poll(
          () =>
            queues.enqueue("w", job("again")).then(
              () => "up",
              () => "down",
            ),
          { timeout: 10_000 },
        )
        .toBe("up");
      await expect.poll(() => received, { timeout: 20_000 }).toContain("again");
    } finally {
      await consumer?.close();
      await queues.close();
      await own.stop();
    }
  });

  it("is refused when it never was there", async () => {
    const queues = redisJobQueues({ url: "redis://127.0.0.1:1", logger });
    await expect(queues.consume("w", async () => {}, { concurrency: 1 })).rejects.toMatchObject({
      code: "QUEUE_UNAVAILABLE",
    });
    await queues.close();
  });
});

describe("PGlite on disk", () => {
  it("keeps jobs over a restart", async () => {
    const dataDirectory = await mkdtemp(join(tmpdir(), "kivimesh-queue-"));
    try {
      const first = await pgliteJobQueues({ dataDirectory, logger });
      await first.enqueue("w", job("kept"));
      await first.close();
      const before = performance.now();
      const second = await pgliteJobQueues({ dataDirectory, logger });
      console.log(`opened again in ${Math.round(performance.now() - before)} ms`);
      expect(await second.counts("w")).toEqual({ waiting: 1, active: 0 });
      await second.close();
    } finally {
      await rm(dataDirectory, { recursive: true, force: true });
    }
  });
});

describe("PGlite from a prepared database", () => {
  it("starts empty from what the first start kept, and survives its damage", async () => {
    const cacheDirectory = await mkdtemp(join(tmpdir(), "kivimesh-queue-cache-"));
    const run = async () => {
      const before = performance.now();
      const queues = await pgliteJobQueues({ cacheDirectory, logger });
      console.log(`opened in ${Math.round(performance.now() - before)} ms`);
      expect(await queues.counts("w")).toEqual({ waiting: 0, active: 0 });
      const received: string[] = [];
      const consumer = await queues.consume("w", async (each) => void received.push(each.requestId), {
        concurrency: 1,
      });
      await queues.enqueue("w", job("r"));
      await expect.poll(() => received, { timeout: 10_000 }).toEqual(["r"]);
      await consumer.close();
      await queues.close();
    };
    try {
      await run();
      const [name, ...more] = await readdir(cacheDirectory);
      expect(more).toEqual([]);
      await run();
      await writeFile(join(cacheDirectory, name!), "not an archive");
      await run();
      await run();
    } finally {
      await rm(cacheDirectory, { recursive: true, force: true });
    }
  });
});
