/** Host side of a page: the reference quantizer and dequantizer, for tests, inspection and self-checks. */
import { floatToHalf, halfToFloat } from "./half.ts";
import { KV_GROUP, type KvBits, type KvFormat, type KvShape } from "./kv-format.ts";
import {
  codesPerWord,
  type KvPageLayout,
  keyMetaOffset,
  keyWordOffset,
  kvPageLayout,
  valueMetaOffset,
  valueWordOffset,
} from "./kv-layout.ts";

/** K and V of one layer of a block: f32 [blockTokens][kvHeads][headDim] each. */
export interface KvPageValues {
  readonly keys: Float32Array<ArrayBuffer>;
  readonly values: Float32Array<ArrayBuffer>;
}

/** One quantized group: the bits of the f16 scale and zero, and the codes. */
export interface QuantizedGroup {
  readonly scale: number;
  readonly zero: number;
  readonly codes: readonly number[];
}

/** Multiplies `vector` by the orthonormal Hadamard matrix of its length (a power of two), in f32, stages 1, 2, 4, ... */
export function hadamard(vector: Float32Array): void {
  const size = vector.length;
  if ((size & (size - 1)) !== 0) throw new RangeError(`length ${size} is not a power of two`);
  for (let half = 1; half < size; half *= 2) {
    for (let start = 0; start < size; start += 2 * half) {
      for (let i = start; i < start + half; i++) {
        const a = vector[i] as number;
        const b = vector[i + half] as number;
        vector[i] = a + b;
        vector[i + half] = a - b;
      }
    }
  }
  const factor = Math.fround(1 / Math.sqrt(size));
  for (let i = 0; i < size; i++) vector[i] = (vector[i] as number) * factor;
}

function roundHalfEven(value: number): number {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest > 0.5 || (rest === 0.5 && floor % 2 === 1)) return floor + 1;
  return floor;
}

/**
 * KIVI's quantizer in f32: scale and zero are rounded to f16 first, codes are computed against the rounded values, half
 * to even. A constant group has scale 0 and codes 0. @throws RangeError where a value, scale or zero is not finite in f16.
 */
export function quantizeGroup(values: ArrayLike<number>, bits: 2 | 4): QuantizedGroup {
  const { fround } = Math;
  const top = 2 ** bits - 1;
  const list = Array.from(values, fround);
  const low = Math.min(...list);
  const high = Math.max(...list);
  const scale = floatToHalf(fround(fround(high - low) / top));
  const zero = floatToHalf(low);
  const scaleValue = halfToFloat(scale);
  const zeroValue = halfToFloat(zero);
  if (!Number.isFinite(scaleValue) || !Number.isFinite(zeroValue)) {
    throw new RangeError(`group of ${low} to ${high} does not fit f16 scale and zero`);
  }
  const codes = list.map((value) => {
    if (scaleValue === 0) return 0;
    const ratio = fround(fround(value - zeroValue) / scaleValue);
    return Math.min(top, Math.max(0, roundHalfEven(ratio)));
  });
  return { scale, zero, codes };
}

/** f16 bits of a token's key norm: sqrt of the mean of squares over all KV heads, f32 sums of f64 squares rounded once. */
export function keyNorm(keys: Float32Array): number {
  let sum = 0;
  for (const value of keys) sum += value * value;
  return floatToHalf(Math.sqrt(sum / keys.length));
}

interface PageView {
  readonly words: Uint32Array;
  readonly layout: KvPageLayout;
  readonly format: KvFormat;
  readonly shape: KvShape;
}

function writeCode(words: Uint32Array, at: number, bits: KvBits, index: number, code: number): void {
  words[at] = ((words[at] as number) | (code << (index * bits))) >>> 0;
}

/**
 * Reference quantizer: seals f16-exact K and V of one layer into a page.
 * @throws RangeError where a value is not finite.
 */
export function encodePage(format: KvFormat, shape: KvShape, { keys, values }: KvPageValues): Uint8Array<ArrayBuffer> {
  const layout = kvPageLayout(format, shape);
  const { blockTokens, kvHeads, headDim } = shape;
  const page = { words: new Uint32Array(layout.page), layout, format, shape };
  const k = keys.slice();
  const v = values.slice();
  const row = kvHeads * headDim;
  if (format.rotated) {
    for (let token = 0; token < blockTokens; token++) {
      const norm = keyNorm(k.subarray(token * row, (token + 1) * row));
      const at = layout.norms + (token >> 1);
      writeCode(page.words, at, 16, token & 1, norm);
      const divisor = halfToFloat(norm);
      for (let head = 0; head < kvHeads; head++) {
        const start = token * row + head * headDim;
        const part = k.subarray(start, start + headDim);
        hadamard(part);
        for (let i = 0; i < headDim; i++) part[i] = divisor === 0 ? 0 : (part[i] as number) / divisor;
        hadamard(v.subarray(start, start + headDim));
      }
    }
  }
  for (let head = 0; head < kvHeads; head++) {
    encodeKeys(page, head, k);
    encodeValues(page, head, v);
  }
  return new Uint8Array(page.words.buffer);
}

function encodeKeys({ words, layout, format, shape }: PageView, head: number, keys: Float32Array): void {
  const { blockTokens, kvHeads, headDim } = shape;
  const bits = format.keyBits;
  const perWord = codesPerWord(bits);
  const codes = head * layout.head + layout.keyCodes;
  const at = (token: number, channel: number) => keys[(token * kvHeads + head) * headDim + channel] as number;
  for (let first = 0; first < blockTokens; first += KV_GROUP) {
    for (let channel = 0; channel < headDim; channel++) {
      const group = Array.from({ length: KV_GROUP }, (_, i) => at(first + i, channel));
      const quantized = bits === 16 ? group.map(floatToHalf) : quantizeGroup(group, bits);
      if (!Array.isArray(quantized)) {
        const meta = head * layout.head + layout.keyMeta + keyMetaOffset(headDim, bits, first, channel);
        words[meta] = (quantized.scale | (quantized.zero << 16)) >>> 0;
      }
      (Array.isArray(quantized) ? quantized : quantized.codes).forEach((code, i) => {
        const word = codes + keyWordOffset(headDim, bits, first + i, Math.floor(channel / perWord));
        writeCode(words, word, bits, channel % perWord, code);
      });
    }
  }
}

function encodeValues({ words, layout, format, shape }: PageView, head: number, values: Float32Array): void {
  const { blockTokens, kvHeads, headDim } = shape;
  const bits = format.valueBits;
  const perWord = codesPerWord(bits);
  const codes = head * layout.head + layout.valueCodes;
  for (let token = 0; token < blockTokens; token++) {
    const row = values.subarray((token * kvHeads + head) * headDim, (token * kvHeads + head + 1) * headDim);
    const size = bits === 16 ? headDim : KV_GROUP;
    for (let first = 0; first < headDim; first += size) {
      const group = row.subarray(first, first + size);
      const quantized = bits === 16 ? Array.from(group, floatToHalf) : quantizeGroup(group, bits);
      if (!Array.isArray(quantized)) {
        const meta = head * layout.head + layout.valueMeta + valueMetaOffset(headDim, token, first / KV_GROUP);
        words[meta] = (quantized.scale | (quantized.zero << 16)) >>> 0;
      }
      (Array.isArray(quantized) ? quantized : quantized.codes).forEach((code, i) => {
        const word = codes + valueWordOffset(headDim, bits, token, Math.floor((first + i) / perWord));
        writeCode(words, word, bits, (first + i) % perWord, code);
      });
    }
  }
}

function readCode(word: number, bits: KvBits, index: number): number {
  return (word >>> (index * bits)) & (2 ** bits - 1);
}

function dequantize(code: number, meta: number): number {
  return Math.fround(code * halfToFloat(meta & 0xffff) + halfToFloat(meta >>> 16));
}

/** Stored value of K, rotation and norm not undone. */
function storedKey({ words, layout, format, shape }: PageView, head: number, token: number, channel: number): number {
  const bits = format.keyBits;
  const perWord = codesPerWord(bits);
  const offset = keyWordOffset(shape.headDim, bits, token, Math.floor(channel / perWord));
  const code = readCode(words[head * layout.head + layout.keyCodes + offset] as number, bits, channel % perWord);
  if (bits === 16) return halfToFloat(code);
  const meta = head * layout.head + layout.keyMeta + keyMetaOffset(shape.headDim, bits, token, channel);
  return dequantize(code, words[meta] as number);
}

function storedValue({ words, layout, format, shape }: PageView, head: number, token: number, channel: number): number {
  const bits = format.valueBits;
  const perWord = codesPerWord(bits);
  const offset = valueWordOffset(shape.headDim, bits, token, Math.floor(channel / perWord));
  const code = readCode(words[head * layout.head + layout.valueCodes + offset] as number, bits, channel % perWord);
  if (bits === 16) return halfToFloat(code);
  const part = Math.floor(channel / KV_GROUP);
  const meta = head * layout.head + layout.valueMeta + valueMetaOffset(shape.headDim, token, part);
  return dequantize(code, words[meta] as number);
}

/**
 * Reference dequantizer: K and V of a page as attention sees them, rotation and norms undone.
 * @throws RangeError where the page has the wrong length.
 */
export function decodePage(format: KvFormat, shape: KvShape, page: Uint8Array): KvPageValues {
  const layout = kvPageLayout(format, shape);
  if (page.byteLength !== layout.page * 4) {
    throw new RangeError(`page of ${page.byteLength} bytes: format ${format.name} has ${layout.page * 4}`);
  }
  const words = new Uint32Array(page.slice().buffer);
  const view = { words, layout, format, shape };
  const { blockTokens, kvHeads, headDim } = shape;
  const keys = new Float32Array(blockTokens * kvHeads * headDim);
  const values = new Float32Array(keys.length);
  for (let token = 0; token < blockTokens; token++) {
    const norm = readCode(words[layout.norms + (token >> 1)] ?? 0, 16, token & 1);
    for (let head = 0; head < kvHeads; head++) {
      const start = (token * kvHeads + head) * headDim;
      for (let channel = 0; channel < headDim; channel++) {
        keys[start + channel] = storedKey(view, head, token, channel);
        values[start + channel] = storedValue(view, head, token, channel);
      }
      if (!format.rotated) continue;
      const key = keys.subarray(start, start + headDim);
      hadamard(key);
      for (let i = 0; i < headDim; i++) key[i] = (key[i] as number) * halfToFloat(norm);
      hadamard(values.subarray(start, start + headDim));
    }
  }
  return { keys, values };
}
