/** What the engine is asked for and what it answers. These types cross the thread boundary: plain data only. */
import type { ErrorCode } from "@kivimesh/proto";
import type { SamplingParameters } from "./model/index.ts";

/** One attempt at generating from tokens. */
export interface GenerationRequest {
  readonly requestId: string;
  /** Attempt number: a lower one than was seen of the same request is dropped. */
  readonly epoch: number;
  /** Prompt and, in a resumed request, the tokens generated so far. At least one. */
  readonly tokens: Uint32Array;
  /** How many of `tokens` are the client's prompt. */
  readonly promptTokens: number;
  /** New tokens of this attempt, at most. */
  readonly maxTokens: number;
  readonly sampling: SamplingParameters;
  /** They end the request and are not delivered. */
  readonly stopTokenIds: readonly number[];
  /** 32 bytes, part of every block id. */
  readonly tenantNamespace: Uint8Array;
  /** 0: none. */
  readonly deadlineUnixMs: number;
  /** Also return the logits of the first new token. */
  readonly returnFirstLogits: boolean;
}

/** Where the KV of the prompt's tokens came from; the sum is the prompt's length. */
export interface TokenSources {
  readonly gpu: number;
  readonly peer: number;
  readonly cachestore: number;
  readonly computed: number;
}

/** What one attempt used. Counts are tokens, sizes bytes. */
export interface GenerationUsage {
  readonly promptTokens: number;
  /** All completion tokens of the request: those that came with it and those of this attempt. */
  readonly completionTokens: number;
  readonly sources: TokenSources;
  /** KV of the whole sequence as f16. */
  readonly kvF16Bytes: number;
  /** The same as kept: sealed blocks, and the f16 residual for the rest. */
  readonly kvStoredBytes: number;
  /** Payload bytes fetched from the cachestore for this request. */
  readonly fetchedBytes: number;
}

/** `stopToken`: the model ended; `length`: the limit; `aborted`: asked for; `failed`: see the error. */
export type GenerationOutcome = "stopToken" | "length" | "aborted" | "failed";

/** New tokens of one attempt. */
export interface TokensEvent {
  readonly type: "tokens";
  readonly requestId: string;
  readonly epoch: number;
  /** Of the first of `ids`, counted from 0 in this attempt. */
  readonly index: number;
  readonly ids: readonly number[];
  /** Of each id under the unmodified softmax. */
  readonly logprobs: readonly number[];
  /** f32 [vocabulary], only with index 0 and only where asked for. */
  readonly firstLogits?: Float32Array;
}

/** The last event of every attempt that was accepted. */
export interface FinishedEvent {
  readonly type: "finished";
  readonly requestId: string;
  readonly epoch: number;
  readonly outcome: GenerationOutcome;
  readonly usage: GenerationUsage;
  /** With outcome "failed". */
  readonly error?: { readonly code: ErrorCode; readonly message: string };
}

export type GenerationEvent = TokensEvent | FinishedEvent;

/** Greedy sampling. */
export const greedySampling: SamplingParameters = { temperature: 0, topK: 0, topP: 1, seed: 0n };
