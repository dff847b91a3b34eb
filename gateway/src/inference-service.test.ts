import { ClusterError, createClient, FinishReason, type GenerateResponse, Inference } from "@kivimesh/proto";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Gateway } from "./gateway.ts";
import { TestCluster, until } from "./testing/cluster.ts";
import type { ScriptedWorker } from "./testing/scripted-worker.ts";

describe("kivimesh.v1.Inference", () => {
  let cluster: TestCluster;
  let worker: ScriptedWorker;
  let gateway: Gateway;
  let rpc: ReturnType<TestCluster["client"]>;

  beforeAll(async () => {
    cluster = await TestCluster.start();
    worker = await cluster.worker("a");
    gateway = await cluster.gateway();
    rpc = cluster.client(gateway);
  });

  afterAll(() => cluster[Symbol.asyncDispose]());

  async function collect(stream: AsyncIterable<GenerateResponse>) {
    const messages: GenerateResponse[] = [];
    for await (const message of stream) messages.push(message);
    const deltas = messages.flatMap(({ event }) => (event.case === "delta" ? [event.value] : []));
    const finish = messages.flatMap(({ event }) => (event.case === "finish" ? [event.value] : []));
    return { messages, deltas, finish, text: deltas.map((delta) => delta.text).join("") };
  }

  it("streams the request id, then text with its tokens, then one finish", async () => {
    const { messages, deltas, finish, text } = await collect(
      rpc.generate({ input: { case: "prompt", value: "once" }, returnFirstLogits: true, seed: undefined } as object),
    );
    expect(messages[0]?.event.case).toBeUndefined();
    expect(messages[0]?.requestId).toBe(worker.jobs.at(-1)?.requestId);
    expect(new Set(messages.map((message) => message.requestId)).size).toBe(1);
    expect(text).toBe("Hello 😀 world");
    expect(Array.from(deltas[0]?.firstLogits ?? [])).toEqual([1, 2, 3, 4]);
    expect(deltas.slice(1).every((delta) => delta.firstLogits.length === 0)).toBe(true);
    const { ids } = await rpc.tokenize({ input: { case: "text", value: text } });
    expect(deltas.flatMap((delta) => delta.tokenIds)).toEqual(ids);
    expect(finish).toHaveLength(1);
    expect(finish[0]).toMatchObject({
      reason: FinishReason.STOP,
      usage: { completionTokens: ids.length, cachedTokens: 3, kivimesh: { worker: "a", kvFormat: "kivi2r" } },
    });
  });

  it("takes tokens and chats, and tokenizes as it will generate", async () => {
    const chat = { messages: [{ role: "user", content: "hi" }] };
    const { ids } = await rpc.tokenize({ input: { case: "chat", value: chat } });
    await collect(rpc.generate({ model: "scripted", input: { case: "chat", value: chat } }));
    expect(worker.jobs.at(-1)?.tokens).toEqual(ids);
    const { finish } = await collect(
      rpc.generate({
        input: { case: "tokens", value: { ids: [5, 6, 7] } },
        maxTokens: 2,
        sampling: { temperature: 0 },
      }),
    );
    expect(worker.jobs.at(-1)).toMatchObject({ tokens: [5, 6, 7], maxTokens: 2, temperature: 0, topP: 1 });
    expect(finish[0]?.reason).toBe(FinishReason.LENGTH);
  });

  it("lists models", async () => {
    const { models } = await rpc.listModels({});
    expect(models).toMatchObject([{ id: "scripted", kvFormat: "kivi2r", contextTokens: 512 }]);
    expect(models[0]?.digest).toHaveLength(64);
  });

  it("cancels by request id: the stream finishes as cancelled", async () => {
    worker.behaviour.pauseAt = 4;
    const stream = rpc.generate({ input: { case: "prompt", value: "once" } })[Symbol.asyncIterator]();
    const requestId = (await stream.next()).value?.requestId ?? "";
    await until("the job", () => worker.jobs.some((job) => job.requestId === requestId));
    expect(await rpc.cancel({ requestId })).toMatchObject({ found: true });
    const last: GenerateResponse[] = [];
    for (let next = await stream.next(); !next.done; next = await stream.next()) last.push(next.value);
    expect(last.at(-1)?.event).toMatchObject({ case: "finish", value: { reason: FinishReason.CANCELLED } });
    expect(await rpc.cancel({ requestId })).toMatchObject({ found: false });
    worker.behaviour.pauseAt = Number.POSITIVE_INFINITY;
  });

  it("aborts at the worker when the caller goes away", async () => {
    worker.behaviour.pauseAt = 4;
    const gone = new AbortController();
    const before = worker.aborts.length;
    const reading = (async () => {
      for await (const message of rpc.generate({ input: { case: "prompt", value: "once" } }, { signal: gone.signal })) {
        if (message.event.case === "delta") gone.abort();
      }
    })();
    await expect(reading).rejects.toMatchObject({ code: "CANCELLED" });
    await until("the abort", () => worker.aborts.length > before);
    await cluster.quiet();
    worker.behaviour.pauseAt = Number.POSITIVE_INFINITY;
  });

  it.each([
    [{ input: { case: "prompt", value: "x" }, model: "other" }, "MODEL_NOT_FOUND", "model"],
    [
      { input: { case: "prompt", value: "x" }, sampling: { temperature: Number.NaN } },
      "INVALID_ARGUMENT",
      "temperature",
    ],
    [{ input: { case: "prompt", value: "x" }, sampling: { topP: 2 } }, "INVALID_ARGUMENT", "top_p"],
    [{ input: { case: "prompt", value: "x" }, stop: ["a", "b", "c", "d", "e"] }, "INVALID_ARGUMENT", "stop"],
    [{ input: { case: "prompt", value: "x" }, maxTokens: 600 }, "CONTEXT_LENGTH_EXCEEDED", "max_tokens"],
    [
      { input: { case: "chat", value: { messages: [{ role: "wizard", content: "" }] } } },
      "INVALID_ARGUMENT",
      "messages",
    ],
    [{ input: { case: "prompt", value: "x" }, cacheSalt: "s".repeat(65) }, "INVALID_ARGUMENT", "cache_salt"],
    [{}, "INVALID_ARGUMENT", "input"],
  ] as const)("refuses %j", async (request, code, parameter) => {
    const error = await collect(rpc.generate(request as object)).catch((failure: unknown) => failure);
    expect(error).toBeInstanceOf(ClusterError);
    expect(error).toMatchObject({ code, parameter });
  });

  it("tells a client where no worker is", async () => {
    await using empty = await TestCluster.start(cluster.jobQueues);
    const lonely = await empty.gateway();
    const client = createClient(Inference, lonely.grpcAddress);
    const failing = collect(client.generate({ input: { case: "prompt", value: "x" } }));
    await expect(failing).rejects.toMatchObject({ code: "NO_WORKER" });
    expect((await client.listModels({})).models).toEqual([]);
    client.close();
  });
});
