/** Perplexity of a text under the runner's KV format: what the numbers of a format mean for the model's answers. */
import { ClusterError } from "@kivimesh/proto";
import type { ModelRunner } from "./model-runner.ts";

export interface PerplexityOptions {
  /** Tokens of a window; a shorter tail of the text is dropped. */
  readonly contextTokens: number;
  readonly signal?: AbortSignal;
  /** After every chunk: tokens scored so far and in all. */
  readonly onProgress?: (done: number, total: number) => void;
}

export interface PerplexityResult {
  /** exp of the mean negative log-likelihood of every window's tokens after its first. */
  readonly perplexity: number;
  /** Tokens that count: windows * (contextTokens - 1). */
  readonly tokens: number;
  readonly windows: readonly number[];
}

/**
 * Scores consecutive windows that do not overlap. Uses slot 0 and the first pages.
 * @throws ClusterError INVALID_ARGUMENT where a window does not fit the runner or the text has none.
 */
export async function textPerplexity(
  runner: ModelRunner,
  tokens: Uint32Array,
  { contextTokens, signal, onProgress }: PerplexityOptions,
): Promise<PerplexityResult> {
  const { limits, kv } = runner;
  const pages = Math.floor(contextTokens / kv.residualTokens) * (kv.residualTokens / kv.blockTokens);
  if (contextTokens < 2 || contextTokens > limits.maxContextTokens || pages > limits.numPages) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `a context of ${contextTokens} tokens does not fit: at least 2, at most ${limits.maxContextTokens} and ${limits.numPages * kv.blockTokens} in pages`,
      { parameter: "context" },
    );
  }
  const count = Math.floor(tokens.length / contextTokens);
  if (count === 0) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `the text has ${tokens.length} tokens, less than one window of ${contextTokens}`,
      {
        parameter: "text",
      },
    );
  }
  const windows: number[] = [];
  let total = 0;
  for (let window = 0; window < count; window++) {
    const text = tokens.subarray(window * contextTokens, (window + 1) * contextTokens);
    const loss = await windowLoss(runner, text, pages, (done) => {
      signal?.throwIfAborted();
      onProgress?.(window * contextTokens + done, count * contextTokens);
    });
    windows.push(Math.exp(loss / (contextTokens - 1)));
    total += loss;
  }
  const counted = count * (contextTokens - 1);
  return { perplexity: Math.exp(total / counted), tokens: counted, windows };
}

/** Sum of the negative log-likelihoods of a window's tokens after its first. */
async function windowLoss(
  runner: ModelRunner,
  text: Uint32Array,
  pages: number,
  onChunk: (done: number) => void,
): Promise<number> {
  const { residualTokens } = runner.kv;
  const step = Math.floor(runner.limits.maxPrefillRows / residualTokens) * residualTokens;
  const pageTable = Array.from({ length: pages }, (_, page) => page);
  let loss = 0;
  for (let position = 0; position < text.length; position += step) {
    const tokens = text.slice(position, position + step);
    // Row i predicts the token after it; the window's last row predicts nothing that counts.
    const score = new Uint32Array(tokens.length);
    score.set(text.subarray(position + 1, position + 1 + tokens.length));
    const { scores, nonFiniteSlots } = await runner.step({
      prefill: [{ slot: 0, tokens, position, pageTable, score }],
      decode: [],
    });
    if (nonFiniteSlots.length > 0) throw new ClusterError("KV_NOT_FINITE", "K or V is not finite in the scored text");
    const counted = Math.min(tokens.length, text.length - 1 - position);
    for (const logprob of scores[0]?.logprobs.subarray(0, counted) ?? []) loss -= logprob;
    onChunk(position + tokens.length);
  }
  return loss;
}
