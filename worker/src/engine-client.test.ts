import type { Worker } from "node:worker_threads";
import { create } from "@bufbuild/protobuf";
import { Finished_Outcome, GenerateJobSchema, hex } from "@kivimesh/proto";
import { afterEach, expect, it } from "vitest";
import { EngineClient } from "./engine-client.ts";
import type { FromEngine } from "./engine-messages.ts";
import { GatewayStreams, type StreamEvent } from "./gateway-streams.ts";
import { RunningRequests } from "./running-requests.ts";
import { watchThread } from "./testing/thread-watch.ts";

const config = {
  dummyArchitecture: "tiny-llama",
  kvFormat: "kivi2r",
  blockTokens: 32,
  residualTokens: 32,
  maxSequences: 2,
  maxPrefillRows: 64,
  maxContextTokens: 2048,
};

const clients: EngineClient[] = [];

afterEach(async () => {
  for (const client of clients.splice(0)) await client.close();
});

async function start(onThread?: (thread: Worker) => void) {
  const { thread, value: client } = await watchThread(() => EngineClient.start(config), onThread);
  clients.push(client);
  return { thread, client };
}

/** Requests over an engine, a gateway that listens, and what it hears. */
function requestsOver(client: EngineClient) {
  const streams = new GatewayStreams(() => undefined);
  const digest = client.model.digest;
  const requests = new RunningRequests(client, streams, { id: "w", kvFormat: "kivi2r", modelDigest: digest });
  client.listen({ onEvents: (events) => requests.deliver(events), onPrefixChange() {}, onStats() {} });
  const heard: StreamEvent["event"][] = [];
  const leave = new AbortController();
  const reading = (async () => {
    for await (const { event } of streams.subscribe("gateway", leave.signal)) heard.push(event);
  })();
  const run = (requestId: string) => {
    const tokens = Array.from({ length: 40 }, (_, index) => index);
    const job = { requestId, epoch: 1, gatewayId: "gateway", modelDigest: hex(digest), tokens, promptTokens: 40 };
    return requests.run(
      create(GenerateJobSchema, { ...job, maxTokens: 3, topP: 1, tenantNamespace: new Uint8Array(32) }),
      new AbortController().signal,
    );
  };
  const finished = (requestId: string) =>
    heard.flatMap((event) => (event?.case === "finished" && event.value.requestId === requestId ? [event.value] : []));
  const close = async () => {
    leave.abort();
    await reading;
    streams.close();
  };
  return { requests, run, finished, close };
}

it("describes the model and the device that runs it", async () => {
  const { client } = await start();
  const { name, profile, features } = client.model.device;
  expect(name).not.toBe("");
  expect(["software", "hardware"]).toContain(profile);
  expect(features).toEqual({
    shaderF16: expect.any(Boolean),
    subgroups: expect.any(Boolean),
    subgroupSize: expect.any(Number),
    timestampQuery: expect.any(Boolean),
    subgroupMatrix: expect.any(Boolean),
  });
  expect(client.failure).toBeUndefined();
});

it("answers at once, and closes at once, when its thread has ended", async () => {
  const { thread, client } = await start();
  const { requests, run, finished, close } = requestsOver(client);
  void client.failed.then((error) => requests.failAll(error));
  await run("before");
  await expect.poll(() => finished("before")).toMatchObject([{ outcome: Finished_Outcome.LENGTH }]);
  // Between two steps: a thread that is ended amid GPU work takes the process with it.
  await expect.poll(() => client.stats()).toMatchObject({ running: 0 });
  const ended = thread.terminate();
  const running = run("running");
  const pendingRead = client.readBlock("00".repeat(32));
  await ended;
  await running;
  expect(await client.failed).toMatchObject({ code: "DEVICE_LOST" });
  expect(client.failure).toBe(await client.failed);
  expect(await pendingRead).toBeUndefined();

  const before = performance.now();
  await run("later");
  expect(await client.readBlock("00".repeat(32))).toBeUndefined();
  expect(await client.stats()).toBe(client.lastStats);
  await client.close();
  expect(performance.now() - before).toBeLessThan(500);
  const lost = { outcome: Finished_Outcome.FAILED, errorCode: "DEVICE_LOST" };
  await expect.poll(() => finished("later")).toMatchObject([lost]);
  expect(finished("running")).toMatchObject([lost]);
  expect(requests.size).toBe(0);
  await close();
});

it("does not lose a failure that comes right behind ready", async () => {
  const failed: FromEngine = { type: "failed", error: { code: "DEVICE_LOST", message: "unplugged" } };
  const { client } = await start((thread) => {
    thread.on("message", (message: FromEngine) => {
      if (message.type === "ready") thread.emit("message", failed);
    });
  });
  expect(client.failure).toMatchObject({ code: "DEVICE_LOST", message: "unplugged" });
  expect(await client.failed).toBe(client.failure);
});
