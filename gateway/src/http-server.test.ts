import { setTimeout as delay } from "node:timers/promises";
import OpenAI from "openai";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import type { Gateway } from "./gateway.ts";
import { metric, TestCluster, until } from "./testing/cluster.ts";
import type { ScriptedWorker } from "./testing/scripted-worker.ts";

/** A JSON body of either kind. */
async function json(response: Response) {
  return (await response.json()) as {
    error: { message: string; code: string };
    usage: { kivimesh: { worker: string } };
  };
}

const answer = "Hello 😀 world";
const messages = [{ role: "user" as const, content: "hi" }];

describe("OpenAI over HTTP", () => {
  let cluster: TestCluster;
  let worker: ScriptedWorker;
  let gateway: Gateway;
  let openai: OpenAI;

  beforeAll(async () => {
    cluster = await TestCluster.start();
    worker = await cluster.worker("a");
    gateway = await cluster.gateway({ limits: { maxBodyBytes: 100_000, ssePingMs: 50 } });
    openai = new OpenAI({ baseURL: `${gateway.httpUrl}/v1`, apiKey: "unused", maxRetries: 0 });
  });

  afterEach(async () => {
    Object.assign(worker.behaviour, { answer, delayMs: 1, pauseAt: Number.POSITIVE_INFINITY, failure: undefined });
    await cluster.quiet();
  });

  afterAll(() => cluster[Symbol.asyncDispose]());

  const post = (path: string, body: object, headers: Record<string, string> = {}, signal?: AbortSignal) =>
    fetch(`${gateway.httpUrl}${path}`, {
      method: "POST",
      headers: { "content-type": "application/json", ...headers },
      body: JSON.stringify({ model: "scripted", ...body }),
      ...(signal === undefined ? {} : { signal }),
    });

  it("lists models", async () => {
    const models = await openai.models.list();
    expect(models.data.map((model) => model.id)).toEqual(["scripted"]);
    expect(await openai.models.retrieve("scripted")).toMatchObject({ object: "model", owned_by: "kivimesh" });
    await expect(openai.models.retrieve("other")).rejects.toBeInstanceOf(OpenAI.NotFoundError);
  });

  it("answers a chat whole, with usage", async () => {
    const completion = await openai.chat.completions.create({ model: "scripted", messages });
    expect(completion.choices).toEqual([
      {
        index: 0,
        message: { role: "assistant", content: answer, refusal: null },
        logprobs: null,
        finish_reason: "stop",
      },
    ]);
    const prompt = worker.jobs.at(-1)?.promptTokens ?? 0;
    const tokens = completion.usage?.completion_tokens ?? 0;
    expect(completion.usage).toEqual({
      prompt_tokens: prompt,
      completion_tokens: tokens,
      total_tokens: prompt + tokens,
      prompt_tokens_details: { cached_tokens: 3 },
      kivimesh: {
        worker: "a",
        kvFormat: "kivi2r",
        promptTokensBySource: { gpu: 1, peer: 0, cachestore: 2, computed: prompt - 3 },
        kvF16Bytes: 3000,
        kvStoredBytes: 600,
        fetchedBytes: 1000,
      },
    });
    expect(tokens).toBeGreaterThan(10);
  });

  it("streams a chat: role first, whole characters, finish reason, usage last", async () => {
    const stream = await openai.chat.completions.create({
      ...{ model: "scripted", messages, stream: true, stream_options: { include_usage: true } },
    });
    const chunks: OpenAI.ChatCompletionChunk[] = [];
    for await (const chunk of stream) chunks.push(chunk);
    expect(chunks[0]?.choices[0]?.delta).toEqual({ role: "assistant", content: "" });
    expect(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("")).toBe(answer);
    expect(chunks.some((chunk) => chunk.choices[0]?.delta.content?.includes("\ufffd"))).toBe(false);
    expect(chunks.at(-2)?.choices[0]?.finish_reason).toBe("stop");
    expect(chunks.at(-1)).toMatchObject({ choices: [], usage: { kivimesh: { worker: "a" } } });
    expect(chunks.slice(0, -1).every((chunk) => chunk.usage === null)).toBe(true);
    expect(new Set(chunks.map((chunk) => chunk.id)).size).toBe(1);
  });

  it("ends the stream with [DONE] and has no usage unless asked", async () => {
    const text = await (await post("/v1/chat/completions", { messages, stream: true })).text();
    expect(text.trimEnd().endsWith("data: [DONE]")).toBe(true);
    expect(text).not.toContain("usage");
  });

  it("completes a plain prompt, at most 16 tokens unless told, with finish reason length", async () => {
    worker.behaviour.answer = "x".repeat(100);
    const completion = await openai.completions.create({ model: "scripted", prompt: "once" });
    expect(completion.choices[0]).toEqual({ index: 0, text: "x".repeat(16), logprobs: null, finish_reason: "length" });
    expect(completion.usage?.completion_tokens).toBe(16);
    const stream = await openai.completions.create({ model: "scripted", prompt: "once", max_tokens: 3, stream: true });
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.text ?? "";
    expect(text).toBe("xxx");
  });

  it("hands the sampling parameters to the worker; a missing seed is random", async () => {
    const sampling = { temperature: 0.5, top_p: 0.9, top_k: 7, seed: 42, max_tokens: 9, ignore_eos: true };
    await post("/v1/chat/completions", { messages, ...sampling }).then((response) => response.json());
    const job = worker.jobs.at(-1);
    expect(job).toMatchObject({ temperature: 0.5, topK: 7, seed: 42n, maxTokens: 9, stopTokenIds: [], epoch: 1 });
    expect(job?.topP).toBeCloseTo(0.9);
    await openai.chat.completions.create({ model: "scripted", messages });
    await openai.chat.completions.create({ model: "scripted", messages });
    const [first, second] = worker.jobs.slice(-2);
    expect(first?.seed).not.toBe(second?.seed);
    expect(first?.stopTokenIds).toEqual(worker.source.endTokenIds);
    expect(first?.maxTokens).toBe(512 - (first?.promptTokens ?? 0));
    expect(first?.tenantNamespace).toEqual(second?.tenantNamespace);
  });

  it("ends before a stop string that lies across tokens, stops the worker, and reports its usage", async () => {
    worker.behaviour.answer = "one two three END four";
    worker.behaviour.pauseAt = 20;
    const completion = await openai.chat.completions.create({ model: "scripted", messages, stop: ["END", "zzz"] });
    expect(completion.choices[0]).toMatchObject({ message: { content: "one two three " }, finish_reason: "stop" });
    expect(completion.usage).toMatchObject({ prompt_tokens_details: { cached_tokens: 3 } });
    expect(worker.aborts.some((abort) => completion.id.endsWith(abort.requestId))).toBe(true);
  });

  it("never shows special tokens", async () => {
    worker.behaviour.answer = "a<|im_end|>b<|im_start|>c";
    const completion = await openai.chat.completions.create({ model: "scripted", messages });
    expect(completion.choices[0]?.message.content).toBe("abc");
  });

  it("maps errors to the client's exception classes and names the parameter", async () => {
    const create = (body: object) => openai.chat.completions.create({ model: "scripted", messages, ...body });
    const bad = await create({ temperature: 9 }).catch((error: unknown) => error);
    expect(bad).toBeInstanceOf(OpenAI.BadRequestError);
    expect(bad).toMatchObject({
      status: 400,
      param: "temperature",
      code: "invalid_argument",
      type: "invalid_request_error",
    });
    await expect(create({ model: "other" })).rejects.toMatchObject({
      status: 404,
      code: "model_not_found",
      param: "model",
    });
    await expect(create({ model: "other" })).rejects.toThrow(/scripted/);
    const long = await create({ max_tokens: 600 }).catch((error: unknown) => error);
    expect(long).toMatchObject({ status: 400, code: "context_length_exceeded", param: "max_tokens" });
    await expect(create({ messages: [{ role: "user", content: "x ".repeat(600) }] })).rejects.toThrow(/context/);
    const large = await create({ user: "u".repeat(100_001) }).catch((error: unknown) => error);
    expect(large).toMatchObject({ status: 413, code: "request_too_large" });
    const unknown = await fetch(`${gateway.httpUrl}/v1/embeddings`, { method: "POST" });
    expect([unknown.status, (await json(unknown)).error.code]).toEqual([404, "not_found"]);
    const broken = await fetch(`${gateway.httpUrl}/v1/completions`, {
      ...{ method: "POST", body: "{", headers: { "content-type": "application/json" } },
    });
    expect([broken.status, (await json(broken)).error.message]).toEqual([400, "the body is not valid JSON"]);
  });

  it("refuses prompts with ids outside the vocabulary and empty ones", async () => {
    const complete = (prompt: string | number[]) => openai.completions.create({ model: "scripted", prompt });
    await expect(complete([1, 99_999])).rejects.toThrow(/99999 is not in the vocabulary/);
    await expect(complete("")).rejects.toThrow(/must not be empty/);
  });

  it("passes on a worker's own refusal, in a stream as an error event", async () => {
    worker.behaviour.failure = "KV_NOT_FINITE";
    const whole = await post("/v1/chat/completions", { messages });
    expect([whole.status, (await json(whole)).error.code]).toEqual([500, "kv_not_finite"]);
    const stream = await openai.chat.completions.create({ model: "scripted", messages, stream: true });
    const reading = (async () => {
      for await (const _chunk of stream);
    })();
    await expect(reading).rejects.toThrow(/scripted/);
  });

  it("pins a request to a worker, and says so where that worker is not there", async () => {
    const body = { messages };
    const pinned = await post("/v1/chat/completions", body, { "x-kivimesh-worker": "a" });
    expect((await json(pinned)).usage.kivimesh.worker).toBe("a");
    const nobody = await post("/v1/chat/completions", body, { "x-kivimesh-worker": "zz" });
    expect(nobody.status).toBe(503);
    expect(nobody.headers.get("retry-after")).toBe("1");
    expect((await json(nobody)).error).toMatchObject({ code: "no_worker", message: expect.stringContaining("zz") });
  });

  it("sends pings while nothing comes", async () => {
    worker.behaviour.pauseAt = 2;
    const response = await post("/v1/chat/completions", { messages, stream: true });
    await delay(300);
    worker.behaviour.pauseAt = Number.POSITIVE_INFINITY;
    expect((await response.text()).match(/^: ping$/gm)?.length).toBeGreaterThan(2);
  });

  it.each([true, false])("aborts at the worker when the client goes away (stream: %s)", async (stream) => {
    worker.behaviour.pauseAt = 4;
    const gone = new AbortController();
    const before = worker.jobs.length;
    const response = post("/v1/chat/completions", { messages, stream }, {}, gone.signal);
    if (stream) await response;
    await until("the job", () => worker.jobs.length > before);
    gone.abort();
    await response.then((value) => value.text()).catch(() => undefined);
    const id = worker.jobs.at(-1)?.requestId;
    await until("the abort", () => worker.aborts.some((abort) => abort.requestId === id));
    await cluster.quiet();
    expect(worker.runningJobs).toBe(0);
  });

  it("takes a waiting job out of the queue when its client goes away", async () => {
    const slow = await cluster.worker("slow", { concurrency: 1, behaviour: { pauseAt: 2 } });
    await cluster.seen(gateway, 2);
    const pin = { "x-kivimesh-worker": "slow" };
    const first = post("/v1/chat/completions", { messages }, pin);
    await until("the first job", () => slow.jobs.length === 1);
    const gone = new AbortController();
    const second = post("/v1/chat/completions", { messages }, pin, gone.signal);
    await until("a waiting job", async () => (await cluster.jobQueues.counts("slow")).waiting === 1);
    gone.abort();
    await second.catch(() => undefined);
    await until("an empty queue", async () => (await cluster.jobQueues.counts("slow")).waiting === 0);
    slow.behaviour.pauseAt = Number.POSITIVE_INFINITY;
    expect((await first).status).toBe(200);
    expect(slow.jobs).toHaveLength(1);
    await slow.close();
    cluster.workers.splice(cluster.workers.indexOf(slow), 1);
    await cluster.seen(gateway, 1);
  });

  it("serves health, metrics and the dashboard", async () => {
    const get = (path: string) => fetch(`${gateway.httpUrl}${path}`);
    expect((await get("/healthz")).status).toBe(200);
    expect((await get("/readyz")).status).toBe(200);
    const text = await (await get("/metrics")).text();
    for (const name of ["kivimesh_time_to_first_token_seconds_count", "kivimesh_inter_token_latency_seconds_count"]) {
      expect(Number(new RegExp(`^${name} (\\d+)$`, "m").exec(text)?.[1])).toBeGreaterThan(0);
    }
    expect(await metric(gateway, 'kivimesh_prompt_tokens_total{source="cachestore"}')).toBeGreaterThan(0);
    expect(await metric(gateway, "vllm:kv_cache_usage_perc")).toBe(0.5);
    const page = await get("/");
    expect(page.headers.get("content-type")).toContain("text/html");
    const state = await (await get("/dashboard.json")).json();
    expect(state).toMatchObject({ models: ["scripted"], workers: [{ id: "a", kvFormat: "kivi2r" }] });
  });
});
