/**
 * How weights lie in GPU memory, and which ggml type maps to which encoding.
 *
 * A row (one output) is a run of u32 code words over its K columns, plus words of scales for each group of columns:
 *
 *   format  columns a word  content of word i of a row
 *   f32     1               column i
 *   f16     2               columns 2i (low half) and 2i + 1
 *   bf16    2               the same
 *   q8      4               four signed bytes, columns 4i … 4i + 3, lowest first
 *   q4      8               word i of a group of 32 (i = 0 … 3): the low nibbles of its bytes are columns 4i … 4i + 3,
 *                           the high nibbles are columns 16 + 4i … 16 + 4i + 3 (as in ggml's 32-element blocks)
 *
 *   scales    words a group  content
 *   none      0
 *   scale32   1              f32 scale:               w = code · scale
 *   pair16    1              f16 scale, f16 minimum:  w = code · scale + minimum
 *   pair32    2              f32 scale, f32 minimum
 *
 * Layout `columns` (software profile) stores word i of every output side by side: [word][output], so that lanes that own
 * neighbouring outputs read neighbouring words. Layout `rows` (hardware profile) stores a row's words side by side:
 * [output][word], so that lanes that share an output do.
 */
import { type GgmlType, ggmlBlock } from "./ggml-quants.ts";

export type WeightFormat = "f32" | "f16" | "bf16" | "q8" | "q4";
export type WeightScales = "none" | "scale32" | "pair16" | "pair32";
export type WeightLayout = "columns" | "rows";

export interface WeightEncoding {
  readonly format: WeightFormat;
  readonly scales: WeightScales;
  /** Columns that share one scale: 16 or 32; 4 where there are none. */
  readonly group: 4 | 16 | 32;
}

const ENCODINGS: Record<GgmlType, WeightEncoding> = {
  F32: { format: "f32", scales: "none", group: 4 },
  F16: { format: "f16", scales: "none", group: 4 },
  BF16: { format: "bf16", scales: "none", group: 4 },
  Q4_0: { format: "q4", scales: "pair16", group: 32 },
  Q4_1: { format: "q4", scales: "pair16", group: 32 },
  Q4_K: { format: "q4", scales: "pair32", group: 32 },
  Q5_0: { format: "q8", scales: "scale32", group: 32 },
  Q5_1: { format: "q8", scales: "pair32", group: 32 },
  Q5_K: { format: "q8", scales: "pair32", group: 32 },
  Q8_0: { format: "q8", scales: "scale32", group: 32 },
  Q6_K: { format: "q8", scales: "scale32", group: 16 },
};

/** The encoding that keeps every value of a ggml type exactly. */
export function weightEncoding(type: GgmlType): WeightEncoding {
  return ENCODINGS[type];
}

const COLUMNS_A_WORD: Record<WeightFormat, number> = { f32: 1, f16: 2, bf16: 2, q8: 4, q4: 8 };
const SCALE_WORDS: Record<WeightScales, number> = { none: 0, scale32: 1, pair16: 1, pair32: 2 };

/** Code words of one row of `columns`. */
export function codeWords(encoding: WeightEncoding, columns: number): number {
  return columns / COLUMNS_A_WORD[encoding.format];
}

/** Scale words of one row of `columns`. */
export function scaleWords(encoding: WeightEncoding, columns: number): number {
  return (columns / encoding.group) * SCALE_WORDS[encoding.scales];
}

/** Code words of one group. */
export function codeWordsPerGroup(encoding: WeightEncoding): number {
  return encoding.group / COLUMNS_A_WORD[encoding.format];
}

/** Scale words of one group. */
export function scaleWordsPerGroup(encoding: WeightEncoding): number {
  return SCALE_WORDS[encoding.scales];
}

/** @throws RangeError unless rows of `columns` are whole blocks of the type and whole vec4s of words and of inputs. */
export function validateColumns(label: string, type: GgmlType, columns: number): void {
  const multiple = Math.max(type === "F32" ? 4 : 8, ggmlBlock(type).elements);
  if (!Number.isInteger(columns) || columns <= 0 || columns % multiple !== 0) {
    throw new RangeError(`${label}: ${columns} columns of ${type}, must be a positive multiple of ${multiple}`);
  }
}
