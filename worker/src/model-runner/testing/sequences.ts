/** Runs sequences through a model runner step by step, as an engine would, for tests. */
import type { ModelRunner, PrefillChunk, SamplingParameters } from "../model-runner.ts";

export const GREEDY: SamplingParameters = { temperature: 0, topK: 0, topP: 1, seed: 0n };

/** Deterministic tokens below `vocabulary`. */
export function promptTokens(length: number, vocabulary: number, seed: number): Uint32Array {
  let state = seed * 2_654_435_761 + 1;
  return Uint32Array.from({ length }, () => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
    return (state >>> 8) % vocabulary;
  });
}

/** `count` pages from `first`. */
export function pages(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, index) => first + index);
}

/** A chunk of `tokens` from `start` to `end`; the last one samples and returns its logits. */
export function chunkOf(
  tokens: Uint32Array,
  start: number,
  end: number,
  slot: number,
  pageTable: readonly number[],
): PrefillChunk {
  const chunk = { slot, tokens: tokens.slice(start, end), position: start, pageTable };
  return end === tokens.length ? { ...chunk, sample: GREEDY, returnLogits: true } : chunk;
}

/** Prefills `tokens` split at `cuts`. @returns the last row's logits and token. */
export async function prefill(
  runner: ModelRunner,
  tokens: Uint32Array,
  slot: number,
  pageTable: readonly number[],
  cuts: readonly number[] = [],
  from = 0,
): Promise<{ token: number; logits: Float32Array }> {
  const ends = [...cuts, tokens.length];
  let start = from;
  for (const end of ends) {
    const { sampled } = await runner.step({ prefill: [chunkOf(tokens, start, end, slot, pageTable)], decode: [] });
    start = end;
    const [last] = sampled;
    if (last?.logits !== undefined) return { token: last.token, logits: last.logits };
  }
  throw new Error("the last chunk sampled nothing");
}

/** Greedy tokens after a prefill of `length` tokens that sampled `first`; `count` in all, the first included. */
export async function decodeGreedy(
  runner: ModelRunner,
  slot: number,
  pageTable: readonly number[],
  length: number,
  first: number,
  count: number,
): Promise<number[]> {
  const tokens = [first];
  while (tokens.length < count) {
    const token = tokens[tokens.length - 1] as number;
    const position = length + tokens.length - 1;
    const { sampled } = await runner.step({
      prefill: [],
      decode: [{ slot, token, position, pageTable, sample: GREEDY }],
    });
    tokens.push((sampled[0] as { token: number }).token);
  }
  return tokens;
}
