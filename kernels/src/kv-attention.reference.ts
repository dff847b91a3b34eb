/** f64 reference of rotary embedding and attention, on the K and V that a format really stores. */
import { floatToHalf, halfToFloat } from "./half.ts";
import type { RopeLayout } from "./kv-kernels.ts";

/** Turns one head (f64 in place) at a position: `frequencies` as from ropeFrequencies, ropeDim / 2 of them. */
export function ropeReference(
  head: Float64Array,
  position: number,
  frequencies: Float64Array,
  layout: RopeLayout,
): void {
  const pairs = frequencies.length;
  for (let pair = 0; pair < pairs; pair++) {
    const first = layout === "half" ? pair : 2 * pair;
    const second = layout === "half" ? pair + pairs : 2 * pair + 1;
    const angle = position * (frequencies[pair] as number);
    const a = head[first] as number;
    const b = head[second] as number;
    head[first] = a * Math.cos(angle) - b * Math.sin(angle);
    head[second] = a * Math.sin(angle) + b * Math.cos(angle);
  }
}

/** Rounds to f16 and back. */
export function throughHalf(values: ArrayLike<number>): Float32Array<ArrayBuffer> {
  return Float32Array.from(values, (value) => halfToFloat(floatToHalf(value)));
}

/**
 * Softmax attention of one query head over `count` tokens in f64.
 * @param key element of K: (token, channel). @param value element of V.
 */
export function attentionReference(
  query: ArrayLike<number>,
  count: number,
  scale: number,
  key: (token: number, channel: number) => number,
  value: (token: number, channel: number) => number,
): Float64Array {
  const size = query.length;
  const logits = Float64Array.from({ length: count }, (_, token) => {
    let sum = 0;
    for (let channel = 0; channel < size; channel++) sum += (query[channel] as number) * key(token, channel);
    return sum * scale;
  });
  const top = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const weights = logits.map((logit) => Math.exp(logit - top));
  const total = weights.reduce((a, b) => a + b, 0);
  const output = new Float64Array(size);
  weights.forEach((weight, token) => {
    for (let channel = 0; channel < size; channel++) {
      output[channel] = (output[channel] as number) + (weight / total) * value(token, channel);
    }
  });
  return output;
}
