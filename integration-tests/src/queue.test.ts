/** Redis is really used: a running request is an active BullMQ job that carries protobuf bytes. */
import { fromBinary } from "@bufbuild/protobuf";
import { GenerateJobSchema } from "@kivimesh/proto";
import { Queue } from "bullmq";
import { expect, it } from "vitest";
import { Cluster, until } from "./cluster.ts";
import { englishPrompt, generate } from "./generation.ts";

it("shows the running request as an active job of the worker's queue", async () => {
  await using cluster = await Cluster.start();
  await cluster.worker("q", undefined);
  const gateway = await cluster.gateway();
  const queue = new Queue("kivimesh-worker-q", { connection: { url: cluster.redis.url } });
  const running = generate(gateway, englishPrompt(5, 60), { workerId: "q", maxTokens: 64 });
  await until("an active job", async () => (await queue.getActiveCount()) === 1);
  const [job] = await queue.getActive();
  const message = fromBinary(GenerateJobSchema, Buffer.from(job?.data.job as string, "base64"));
  const answer = await running;
  expect(message.requestId).toBe(answer.requestId);
  expect(message.tokens).toHaveLength(answer.usage.promptTokens);
  await until("no job left", async () => (await queue.getActiveCount()) + (await queue.getWaitingCount()) === 0);
  await queue.close();
}, 300_000);
