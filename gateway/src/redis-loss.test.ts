/** The queue's store goes away and comes back. */
import { setTimeout as delay } from "node:timers/promises";
import { createLogger, redisJobQueues, redisMembership } from "@kivimesh/proto";
import { startRedis } from "@kivimesh/proto/testing";
import { expect, it } from "vitest";
import { ask, codeOf, stream } from "./testing/chat-client.ts";
import { TestCluster, until } from "./testing/cluster.ts";

const answer = "The quick 🦊 jumps over the lazy dog, and then it does so again.";

it("without Redis running streams go on and new requests get 503 with a retry delay, until it is back", async () => {
  const logger = createLogger("test", "silent");
  const redis = await startRedis();
  const queues = redisJobQueues({ url: redis.url, logger });
  const cluster = await TestCluster.start(queues, redisMembership({ url: redis.url, logger }));
  try {
    const worker = await cluster.worker("a", { behaviour: { answer, pauseAt: 20 } });
    const gateway = await cluster.gateway();
    const { state, done } = stream(gateway);
    await until("text", () => state.text.length > 10);
    await redis.kill();
    const refused = await ask(gateway);
    expect([refused.status, await codeOf(refused)]).toEqual([503, "queue_unavailable"]);
    expect(Number(refused.headers.get("retry-after"))).toBeGreaterThan(0);
    await delay(4_000);
    expect((await fetch(`${gateway.httpUrl}/readyz`)).status).toBe(503);
    worker.behaviour.pauseAt = Number.POSITIVE_INFINITY;
    await done;
    expect(state.text).toBe(answer);
    await redis.restart();
    await until("readiness", async () => (await fetch(`${gateway.httpUrl}/readyz`)).status === 200);
    await until("an answer", async () => (await ask(gateway)).status === 200);
  } finally {
    await cluster[Symbol.asyncDispose]();
    await queues.close();
    await redis.stop();
  }
});
