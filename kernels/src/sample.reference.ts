/** Host reference of the sampler: the same random numbers, probabilities in f64. */
import type { SampleParameters } from "./sample.ts";

/** pcg4d (Jarzynski and Olano, 2020): the first of four random words. */
export function pcg4d(seedLow: number, seedHigh: number, position: number): number {
  const v = [seedLow, seedHigh, position, 0].map((word) => (Math.imul(word, 1664525) + 1013904223) >>> 0);
  const mix = () => {
    v[0] = ((v[0] as number) + Math.imul(v[1] as number, v[3] as number)) >>> 0;
    v[1] = ((v[1] as number) + Math.imul(v[2] as number, v[0] as number)) >>> 0;
    v[2] = ((v[2] as number) + Math.imul(v[0] as number, v[1] as number)) >>> 0;
    v[3] = ((v[3] as number) + Math.imul(v[1] as number, v[2] as number)) >>> 0;
  };
  mix();
  for (let index = 0; index < 4; index++) v[index] = ((v[index] as number) ^ ((v[index] as number) >>> 16)) >>> 0;
  mix();
  return v[0] as number;
}

export interface KeptToken {
  readonly token: number;
  /** Among the kept tokens, after temperature. */
  readonly probability: number;
}

export interface SampleDistribution {
  /** What may be drawn, by index. */
  readonly kept: readonly KeptToken[];
  /** Distance of topP from the nearest cumulative probability: a tiny one makes the kept set a matter of rounding. */
  readonly margin: number;
}

/** Which tokens may be drawn, and how likely each is. */
export function sampleDistribution(logits: Float32Array, parameters: SampleParameters): SampleDistribution {
  const order = Array.from(logits.keys())
    .filter((token) => Number.isFinite(logits[token]))
    .sort((a, b) => (logits[b] as number) - (logits[a] as number) || a - b);
  if (parameters.temperature === 0)
    return { kept: order.slice(0, 1).map((token) => ({ token, probability: 1 })), margin: 1 };
  const top = order.slice(0, parameters.topK === 0 ? order.length : parameters.topK);
  const best = logits[top[0] as number] as number;
  const weights = top.map((token) => Math.exp(((logits[token] as number) - best) / parameters.temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  let count = 0;
  let sum = 0;
  let margin = 1;
  while (count < top.length && (count === 0 || parameters.topP >= 1 || sum < parameters.topP)) {
    sum += (weights[count] as number) / total;
    count++;
    if (parameters.topP < 1) margin = Math.min(margin, Math.abs(sum - parameters.topP));
  }
  const kept = top
    .slice(0, count)
    .map((token, index) => ({ token, probability: (weights[index] as number) / total / sum }));
  return { kept: kept.sort((a, b) => a.token - b.token), margin };
}

/** log softmax of one logit at temperature 1, over the finite logits. */
export function logProbability(logits: Float32Array, token: number): number {
  const finite = logits.filter(Number.isFinite);
  const best = finite.reduce((max, value) => Math.max(max, value), -3e38);
  const total = finite.reduce((sum, value) => sum + Math.exp(value - best), 0);
  return (logits[token] as number) - best - Math.log(total);
}
