/** Perplexity of a text under a model with one KV format, read as the engine reads it: sealed blocks and f16 residual. */
import { ClusterError } from "@kivimesh/proto";
import type { ModelRunner } from "@kivimesh/worker";

export interface PerplexityResult {
  readonly kvFormat: string;
  readonly perplexity: number;
  /** Tokens that were predicted: each window's after its first. */
  readonly tokens: number;
  /** Of a sealed block, scales, zero points and norms included. */
  readonly bitsPerElement: number;
}

/** Consecutive windows of `context` tokens that do not overlap; a shorter tail is dropped. */
export function windows(tokens: Uint32Array, context: number): Uint32Array[] {
  const count = Math.floor(tokens.length / context);
  return Array.from({ length: count }, (_, index) => tokens.subarray(index * context, (index + 1) * context));
}

/** Prompt chunks of a window: each starts at a multiple of R. */
function chunkStarts(runner: ModelRunner, length: number): { position: number; end: number }[] {
  const { residualTokens } = runner.kv;
  const size = Math.floor(runner.limits.maxPrefillRows / residualTokens) * residualTokens;
  const chunks = [];
  for (let position = 0; position < length; position += size)
    chunks.push({ position, end: Math.min(position + size, length) });
  return chunks;
}

/** Sum of the log-probabilities of the window's tokens after its first. */
async function scoreWindow(runner: ModelRunner, window: Uint32Array): Promise<number> {
  const { blockTokens } = runner.kv;
  let sum = 0;
  for (const { position, end } of chunkStarts(runner, window.length)) {
    const tokens = window.slice(position, end);
    // The last row of the window predicts a token outside of it: its score is not counted.
    const score = Uint32Array.from(tokens, (_, index) => window[position + index + 1] ?? 0);
    const pageTable = Array.from({ length: Math.ceil(end / blockTokens) }, (_, page) => page);
    const result = await runner.step({ prefill: [{ slot: 0, tokens, position, pageTable, score }], decode: [] });
    if (result.nonFiniteSlots.length > 0) {
      throw new ClusterError(
        "KV_NOT_FINITE",
        `K, V or logits are not finite in tokens ${position} to ${end} of a window`,
      );
    }
    const logprobs = result.scores[0]?.logprobs ?? new Float32Array();
    if (logprobs.length !== tokens.length) throw new ClusterError("INTERNAL", "the model runner returned no scores");
    const counted = end === window.length ? logprobs.length - 1 : logprobs.length;
    for (let index = 0; index < counted; index++) sum += logprobs[index] ?? Number.NaN;
  }
  return sum;
}

/**
 * Perplexity over all windows: exp of minus the mean log-probability.
 * @throws ClusterError INVALID_ARGUMENT where the text has not one whole window.
 */
export async function perplexity(
  runner: ModelRunner,
  tokens: Uint32Array,
  context: number,
  onWindow: (done: number, total: number) => void = () => {},
): Promise<PerplexityResult> {
  const all = windows(tokens, context);
  if (all.length === 0) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `the text has ${tokens.length} tokens, less than one window of ${context}`,
    );
  }
  let sum = 0;
  for (const [index, window] of all.entries()) {
    sum += await scoreWindow(runner, window);
    onWindow(index + 1, all.length);
  }
  const count = all.length * (context - 1);
  return {
    kvFormat: runner.kv.format.name,
    perplexity: Math.exp(-sum / count),
    tokens: count,
    bitsPerElement: runner.kv.bitsPerElement,
  };
}
