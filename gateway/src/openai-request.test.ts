import { ClusterError } from "@kivimesh/proto";
import { describe, expect, it } from "vitest";
import { parseChatRequest, parseCompletionRequest } from "./openai-request.ts";

const origin = { workerId: "w", clientRequestId: "c" };
const messages = [{ role: "user", content: "hi" }];

function chatFailure(body: unknown): { parameter: string | undefined; message: string } {
  try {
    parseChatRequest(body, origin);
  } catch (error) {
    if (error instanceof ClusterError && error.code === "INVALID_ARGUMENT") return error;
    throw error;
  }
  throw new Error(`accepted ${JSON.stringify(body)}`);
}

describe("parseChatRequest", () => {
  it("fills in OpenAI's defaults", () => {
    expect(parseChatRequest({ model: "m", messages }, origin)).toEqual({
      generation: {
        model: "m",
        input: { kind: "chat", turns: messages },
        maxTokens: undefined,
        temperature: 1,
        topP: 1,
        topK: 0,
        seed: undefined,
        stop: [],
        ignoreEos: false,
        cacheSalt: "",
        returnFirstLogits: false,
        ...origin,
      },
      stream: false,
      includeUsage: false,
    });
  });

  it("reads every parameter that it supports", () => {
    const { generation, stream, includeUsage } = parseChatRequest(
      {
        ...{ model: "m", messages, temperature: 0, top_p: 0.5, top_k: -1, seed: -1, stop: "x", max_tokens: 5 },
        ...{ max_completion_tokens: 7, stream: true, stream_options: { include_usage: true }, cache_salt: "s" },
      },
      origin,
    );
    expect(generation).toMatchObject({ temperature: 0, topP: 0.5, topK: 0, stop: ["x"], maxTokens: 7, cacheSalt: "s" });
    expect(generation.seed).toBe(0xffff_ffff_ffff_ffffn);
    expect([stream, includeUsage]).toEqual([true, true]);
  });

  it("joins text parts and takes developer as system", () => {
    const parts = [
      { type: "text", text: "a" },
      { type: "text", text: "b" },
    ];
    const { generation } = parseChatRequest({ model: "m", messages: [{ role: "developer", content: parts }] }, origin);
    expect(generation.input).toEqual({ kind: "chat", turns: [{ role: "system", content: "ab" }] });
  });

  it.each([
    [{ temperature: 3 }, "temperature", "from 0 to 2"],
    [{ temperature: "hot" }, "temperature", "from 0 to 2"],
    [{ top_p: 0 }, "top_p", "above 0 and at most 1"],
    [{ top_k: 1.5 }, "top_k", "whole number"],
    [{ max_tokens: 0 }, "max_tokens", "at least 1"],
    [{ seed: 2 ** 60 }, "seed", "2^53"],
    [{ stop: ["a", "b", "c", "d", "e"] }, "stop", "at most 4"],
    [{ stop: [""] }, "stop.0", "1 to 256"],
    [{ n: 2 }, "n", "must be 1"],
    [{ tools: [{ type: "function" }] }, "tools", "not supported"],
    [{ logprobs: true }, "logprobs", "must be false"],
    [{ response_format: { type: "json_schema" } }, "response_format", "not supported"],
    [{ frequency_penalty: 0.5 }, "frequency_penalty", "must be 0"],
    [{ logit_bias: { 5: 1 } }, "logit_bias", "must be empty"],
    [{ stream_options: { include_usage: "yes" } }, "stream_options.include_usage", "true or false"],
    [{ cache_salt: "x".repeat(65) }, "cache_salt", "64 bytes"],
    [{ temperatur: 1 }, "temperatur", "unknown parameter"],
    [{ messages: [] }, "messages", "at least one"],
    [{ messages: [{ role: "tool", content: "x" }] }, "messages.0.role", "not supported"],
    [{ messages: [{ role: "user", content: [{ type: "image_url" }] }] }, "messages.0.content", "not supported"],
    [{ model: undefined }, "model", "/v1/models"],
  ])("refuses %j and says what is allowed", (change, parameter, words) => {
    const error = chatFailure({ model: "m", messages, ...change });
    expect(error.parameter).toBe(parameter);
    expect(error.message).toContain(words);
    expect(error.message).toContain(parameter);
  });

  it("ignores what does not change the answer, and neutral values of what would", () => {
    const neutral = { n: 1, logprobs: false, tools: [], frequency_penalty: 0, response_format: { type: "text" } };
    const harmless = { user: "u", store: true, metadata: { a: "b" }, prompt_cache_key: "k" };
    const plain = parseChatRequest({ model: "m", messages }, origin);
    expect(parseChatRequest({ model: "m", messages, ...neutral, ...harmless }, origin)).toEqual(plain);
    const nulls = { temperature: null, stop: null, max_tokens: null, seed: null, stream_options: null, n: null };
    expect(parseChatRequest({ model: "m", messages, ...nulls }, origin)).toEqual(plain);
  });

  it("refuses a body that is no object", () => {
    expect(chatFailure("text").message).toContain("JSON object");
  });
});

describe("parseCompletionRequest", () => {
  it("takes one prompt as text or tokens", () => {
    const inputOf = (prompt: unknown) => parseCompletionRequest({ model: "m", prompt }, origin).generation.input;
    expect(inputOf("a")).toEqual({ kind: "text", text: "a" });
    expect(inputOf(["a"])).toEqual({ kind: "text", text: "a" });
    expect(inputOf([1, 2])).toEqual({ kind: "tokens", ids: [1, 2] });
    expect(inputOf([[1, 2]])).toEqual({ kind: "tokens", ids: [1, 2] });
    expect(() => inputOf(["a", "b"])).toThrow(/one prompt a request/);
    expect(() => parseCompletionRequest({ model: "m", prompt: "a", echo: true }, origin)).toThrow(/echo/);
  });

  it("has OpenAI's default length", () => {
    expect(parseCompletionRequest({ model: "m", prompt: "a" }, origin).generation.maxTokens).toBe(16);
  });
});
