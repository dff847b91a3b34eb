import type { Worker as Thread } from "node:worker_threads";
import { create } from "@bufbuild/protobuf";
import {
  createClient,
  type Finished,
  Finished_Outcome,
  GenerateJobSchema,
  hex,
  type JobQueues,
  localMembership,
  pgliteJobQueues,
  Worker,
} from "@kivimesh/proto";
import { afterAll, beforeAll, expect, it } from "vitest";
import type { FromEngine } from "./engine-messages.ts";
import { watchThread } from "./testing/thread-watch.ts";
import { startWorker } from "./worker.ts";

const config = {
  dummyArchitecture: "tiny-llama",
  kvFormat: "kivi2r",
  blockTokens: 32,
  residualTokens: 32,
  maxSequences: 2,
  maxPrefillRows: 64,
  maxContextTokens: 2048,
  logLevel: "silent",
};

let jobQueues: JobQueues;

beforeAll(async () => {
  jobQueues = await pgliteJobQueues({});
});

afterAll(async () => {
  await jobQueues?.close();
});

/** A worker, its engine's thread, and a gateway that listens. */
async function open(id: string, onToken: (index: number, thread: Thread) => void = () => undefined) {
  const membership = localMembership();
  const { thread, value: worker } = await watchThread(() => startWorker({ ...config, id }, { jobQueues, membership }));
  const client = createClient(Worker, worker.address);
  const leave = new AbortController();
  const finished: Finished[] = [];
  const reading = (async () => {
    for await (const { event } of client.subscribe({ gatewayId: "gateway" }, { signal: leave.signal })) {
      if (event.case === "tokens") onToken(event.value.index, thread);
      if (event.case === "finished") finished.push(event.value);
    }
  })().catch((error: unknown) => expect(error).toMatchObject({ code: "CANCELLED" }));
  const enqueue = (requestId: string) => {
    const tokens = Array.from({ length: 40 }, (_, index) => index);
    const job = { requestId, epoch: 1, gatewayId: "gateway", modelDigest: hex(worker.model.digest), tokens };
    const rest = { promptTokens: 40, maxTokens: 1500, topP: 1, tenantNamespace: new Uint8Array(32) };
    return jobQueues.enqueue(id, create(GenerateJobSchema, { ...job, ...rest }));
  };
  /** Expects a worker of no use: out of the cluster, taking nothing, and closed at once. */
  const expectLost = async () => {
    expect(await worker.failed).toMatchObject({ code: "DEVICE_LOST" });
    expect(worker.ready()).toBe(false);
    expect(await membership.list("worker")).toEqual([]);
    const seen = finished.length;
    await enqueue("later");
    const chunks = client.readBlock({ blockId: new Uint8Array(32) })[Symbol.asyncIterator]();
    await expect(chunks.next()).rejects.toMatchObject({ code: "KV_BLOCK_NOT_FOUND" });
    expect(await client.getStats({})).toMatchObject({ activeJobs: 0 });
    expect(await jobQueues.counts(id)).toEqual({ waiting: 1, active: 0 });
    expect(finished).toHaveLength(seen);
    const before = performance.now();
    leave.abort();
    await reading;
    await worker.drain(60_000);
    expect(performance.now() - before).toBeLessThan(8_000);
    client.close();
  };
  return { thread, finished, enqueue, expectLost };
}

it("leaves the cluster and takes nothing more when its engine thread has ended", async () => {
  const { thread, expectLost } = await open("ended");
  await thread.terminate();
  await expectLost();
});

it("fails what runs when the GPU is lost", async () => {
  const lost: FromEngine = { type: "failed", error: { code: "DEVICE_LOST", message: "unplugged" } };
  const { finished, enqueue, expectLost } = await open("unplugged", (index, thread) => {
    if (index === 2) thread.emit("message", lost);
  });
  await enqueue("running");
  await expect
    .poll(() => finished, { timeout: 20_000 })
    .toMatchObject([
      { requestId: "running", outcome: Finished_Outcome.FAILED, errorCode: "DEVICE_LOST", errorMessage: "unplugged" },
    ]);
  await expectLost();
});
