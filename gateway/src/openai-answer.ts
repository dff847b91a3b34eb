import type { Usage } from "@kivimesh/proto";

/** `finish_reason` of both endpoints. */
export type OpenAiFinishReason = "stop" | "length";

/** The two endpoints that generate text. */
export type OpenAiEndpoint = "chat" | "completion";

/** Builds the bodies and stream chunks of one answer. */
export class OpenAiAnswer {
  private readonly chat: boolean;
  private readonly base: { id: string; created: number; model: string; system_fingerprint: string };

  /** `createdSeconds`: Unix time; `fingerprint` changes when answers to the same request may. */
  constructor(
    endpoint: OpenAiEndpoint,
    answer: { requestId: string; model: string; createdSeconds: number; fingerprint: string },
  ) {
    this.chat = endpoint === "chat";
    this.base = {
      id: `${this.chat ? "chatcmpl" : "cmpl"}-${answer.requestId}`,
      created: answer.createdSeconds,
      model: answer.model,
      system_fingerprint: answer.fingerprint,
    };
  }

  /** A whole answer. */
  body(text: string, reason: OpenAiFinishReason, usage: Usage) {
    const choice = this.chat ? { message: { role: "assistant", content: text, refusal: null } } : { text };
    return {
      ...this.base,
      object: this.chat ? "chat.completion" : "text_completion",
      choices: [{ index: 0, ...choice, logprobs: null, finish_reason: reason }],
      usage: openAiUsage(usage),
    };
  }

  /** The chunk that opens a streamed chat; undefined for plain completions, which have none. */
  opening(includeUsage: boolean) {
    return this.chat ? this.chunk({ delta: { role: "assistant", content: "" } }, null, includeUsage) : undefined;
  }

  textChunk(text: string, includeUsage: boolean) {
    return this.chunk(this.chat ? { delta: { content: text } } : { text }, null, includeUsage);
  }

  finishChunk(reason: OpenAiFinishReason, includeUsage: boolean) {
    return this.chunk(this.chat ? { delta: {} } : { text: "" }, reason, includeUsage);
  }

  /** The extra last chunk of `stream_options.include_usage`: no choices. */
  usageChunk(usage: Usage) {
    return { ...this.base, object: this.streamObject, choices: [], usage: openAiUsage(usage) };
  }

  private get streamObject(): string {
    return this.chat ? "chat.completion.chunk" : "text_completion";
  }

  private chunk(part: object, reason: OpenAiFinishReason | null, includeUsage: boolean) {
    return {
      ...this.base,
      object: this.streamObject,
      choices: [{ index: 0, ...part, logprobs: null, finish_reason: reason }],
      // With include_usage every other chunk says null.
      ...(includeUsage ? { usage: null } : {}),
    };
  }
}

/** OpenAI's usage object, with where the prompt's KV came from under `kivimesh`. */
function openAiUsage(usage: Usage) {
  const { kivimesh } = usage;
  const source = kivimesh?.promptTokensBySource;
  return {
    prompt_tokens: usage.promptTokens,
    completion_tokens: usage.completionTokens,
    total_tokens: usage.promptTokens + usage.completionTokens,
    prompt_tokens_details: { cached_tokens: usage.cachedTokens },
    kivimesh: {
      worker: kivimesh?.worker ?? "",
      kvFormat: kivimesh?.kvFormat ?? "",
      promptTokensBySource: {
        gpu: source?.gpu ?? 0,
        peer: source?.peer ?? 0,
        cachestore: source?.cachestore ?? 0,
        computed: source?.computed ?? 0,
      },
      kvF16Bytes: Number(kivimesh?.kvF16Bytes ?? 0n),
      kvStoredBytes: Number(kivimesh?.kvStoredBytes ?? 0n),
      fetchedBytes: Number(kivimesh?.fetchedBytes ?? 0n),
    },
  };
}
