/**
 * Byte layout of a page: one layer's slice of a sealed KV block. The same bytes lie in GPU memory, on the wire and on
 * disk. Everything is little-endian u32 words. T = blockTokens, D = headDim, G = 32, C = 32 / bits = codes in a word,
 * W = D / C = words of one token of one head.
 *
 * ```
 * page   | head 0 | head 1 | ... | head KVH-1 | key norms (rotated formats only: f16[T]) |
 *
 * head   | K codes T*W words | K meta (T/32)*D words | V codes T*W words | V meta T*(D/32) words |
 *          (16-bit sections have no meta)
 *
 * K codes of a group of 32 tokens: columns of four words, so that lanes that each own a token read 16 bytes side by side
 *          | column 0: t0 w0..3 | t1 w0..3 | ... | t31 w0..3 | column 1: t0 w4..7 | ... |   (a last column may be narrower)
 *
 * K meta of a group: one word a channel, scale (low f16) and zero (high f16), in the order of pairs inside a code word:
 *          | c0 | c0+C/2 | c1 | c1+C/2 | ...    for the C channels of word 0, then word 1, ...
 *
 * V codes of a group of 32 tokens: for four tokens at a time, the same word of the four tokens side by side
 *          | quad 0: w0 of t0..3 | w1 of t0..3 | ... | quad 1: w0 of t4..7 | ... |
 *
 * V meta of a group of 32 tokens: one word (scale, zero) a token and 32 channels
 *          | quad 0: channels 0..31 of t0..3 | channels 32..63 of t0..3 | ... | quad 1 ... |
 *
 * word   code j of a word lies at bits [j*bits, (j+1)*bits) and belongs to channel w*C + j. 16-bit: two halves.
 * ```
 */
import { KV_GROUP, type KvBits, type KvFormat, type KvShape, validateKv } from "./kv-format.ts";

/** Where the sections of a page lie. All offsets and sizes in u32 words; `page` is the whole page. */
export interface KvPageLayout {
  readonly page: number;
  /** Words of one head; head h starts at h * head. */
  readonly head: number;
  readonly keyCodes: number;
  readonly keyMeta: number;
  readonly valueCodes: number;
  readonly valueMeta: number;
  /** Start of the key norms; equals `page` where the format has none. */
  readonly norms: number;
}

/** Codes of `bits` in one u32 word. */
export function codesPerWord(bits: KvBits): number {
  return 32 / bits;
}

/** Section offsets of one page. @throws RangeError where the format cannot hold the shape. */
export function kvPageLayout(format: KvFormat, shape: KvShape): KvPageLayout {
  validateKv(format, shape);
  const { blockTokens, headDim, kvHeads } = shape;
  const codes = (bits: KvBits) => (blockTokens * headDim) / codesPerWord(bits);
  const meta = (bits: KvBits) => (bits === 16 ? 0 : (blockTokens * headDim) / KV_GROUP);
  const keyMeta = codes(format.keyBits);
  const valueCodes = keyMeta + meta(format.keyBits);
  const valueMeta = valueCodes + codes(format.valueBits);
  const head = valueMeta + meta(format.valueBits);
  const norms = head * kvHeads;
  const page = norms + (format.rotated ? blockTokens / 2 : 0);
  return { page, head, keyCodes: 0, keyMeta, valueCodes, valueMeta, norms };
}

/** Bytes of one page (one layer of one block): always a multiple of 16. */
export function pageBytes(format: KvFormat, shape: KvShape): number {
  return kvPageLayout(format, shape).page * 4;
}

/** Bytes of one block: all layers. */
export function blockBytes(format: KvFormat, shape: KvShape): number {
  return pageBytes(format, shape) * shape.layers;
}

/** Stored bits per K or V element, scales, zeros and norms included. f16 is 16. */
export function bitsPerElement(format: KvFormat, shape: KvShape): number {
  return (pageBytes(format, shape) * 8) / (2 * shape.blockTokens * shape.kvHeads * shape.headDim);
}

/** Word of K code word `word` of token `token`, from the start of the head's K codes. */
export function keyWordOffset(headDim: number, bits: KvBits, token: number, word: number): number {
  const words = headDim / codesPerWord(bits);
  const column = Math.floor(word / 4);
  const width = Math.min(4, words - column * 4);
  const group = Math.floor(token / KV_GROUP);
  return (group * words + column * 4) * KV_GROUP + (token % KV_GROUP) * width + (word % 4);
}

/** Word of the scale and zero of K channel `channel` for the group of `token`, from the start of the head's K meta. */
export function keyMetaOffset(headDim: number, bits: KvBits, token: number, channel: number): number {
  const perWord = codesPerWord(bits);
  const half = perWord / 2;
  const inWord = channel % perWord;
  const pair = (inWord % half) * 2 + Math.floor(inWord / half);
  return Math.floor(token / KV_GROUP) * headDim + channel - inWord + pair;
}

/** Word of V code word `word` of token `token`, from the start of the head's V codes. */
export function valueWordOffset(headDim: number, bits: KvBits, token: number, word: number): number {
  const words = headDim / codesPerWord(bits);
  return (Math.floor(token / 4) * words + word) * 4 + (token % 4);
}

/** Word of the scale and zero of V channels 32*part..32*part+31 of `token`, from the start of the head's V meta. */
export function valueMetaOffset(headDim: number, token: number, part: number): number {
  return (Math.floor(token / 4) * (headDim / KV_GROUP) + part) * 4 + (token % 4);
}
