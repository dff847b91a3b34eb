/** One request over gRPC, collected: what the tests compare. */
import { create } from "@bufbuild/protobuf";
import { type FinishReason, GenerateRequestSchema, type Usage } from "@kivimesh/proto";
import type { GatewayHandle } from "./cluster.ts";

export interface Generation {
  readonly requestId: string;
  readonly text: string;
  readonly tokenIds: readonly number[];
  /** f32 little-endian, as bytes, so that equality is equality of bits. */
  readonly firstLogits: Uint8Array;
  readonly reason: FinishReason;
  readonly usage: Usage;
}

export interface GenerationOptions {
  readonly workerId?: string;
  readonly maxTokens?: number;
  /** Keeps this request's blocks apart from others' (no prefix hit between different salts). */
  readonly cacheSalt?: string;
  readonly signal?: AbortSignal;
  /** Called at each text delta. */
  readonly onDelta?: (text: string) => void;
}

/** Greedy generation from a plain prompt, first-token logits included. */
export async function generate(
  gateway: GatewayHandle,
  prompt: string,
  options: GenerationOptions = {},
): Promise<Generation> {
  const request = create(GenerateRequestSchema, {
    input: { case: "prompt", value: prompt },
    sampling: { temperature: 0 },
    maxTokens: options.maxTokens ?? 16,
    returnFirstLogits: true,
    // A prompt whose greedy answer is empty would make every comparison of answers trivially true.
    ignoreEos: true,
    workerId: options.workerId ?? "",
    cacheSalt: options.cacheSalt ?? "",
  });
  let text = "";
  let firstLogits = new Uint8Array();
  const tokenIds: number[] = [];
  for await (const message of gateway.rpc.generate(
    request,
    options.signal === undefined ? {} : { signal: options.signal },
  )) {
    if (message.event.case === "delta") {
      const { value } = message.event;
      text += value.text;
      tokenIds.push(...value.tokenIds);
      if (value.firstLogits.length > 0) firstLogits = Uint8Array.from(value.firstLogits);
      options.onDelta?.(value.text);
    } else if (message.event.case === "finish") {
      const { reason, usage } = message.event.value;
      if (usage === undefined) throw new Error("finish without usage");
      if (firstLogits.length === 0 || text === "") throw new Error("an answer without text or logits compares nothing");
      return { requestId: message.requestId, text, tokenIds, firstLogits, reason, usage };
    }
  }
  throw new Error("stream ended without a finish");
}

const SENTENCES = [
  "The lighthouse keeper wrote down the weather every morning before the first boat left the harbour.",
  "A good map shows not only where the roads are but also where they no longer lead.",
  "Water that freezes in a narrow crack pushes the stone apart a little more each winter.",
  "The baker weighed the flour twice, because the scale had been moved during the night.",
  "Most of the letters in the archive were never sent, yet they were folded and sealed with care.",
  "When the bridge was closed for repairs, the ferry ran again for the first time in thirty years.",
];

/** Deterministic English of about `tokens` tokens (the tests check the real count). */
export function englishPrompt(seed: number, tokens: number): string {
  const words: string[] = [`Report number ${seed}.`];
  for (let index = 0; words.join(" ").length < tokens * 4.6; index++) {
    words.push(SENTENCES[(seed * 7 + index * (1 + (seed % 5))) % SENTENCES.length] ?? "", `(${seed + index})`);
  }
  return words.join(" ");
}
