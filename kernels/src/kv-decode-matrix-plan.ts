/** What the parts of the decode matrix kernel share: its template, where things lie in workgroup memory, text of folds. */
import { range } from "./kv-attention-template.ts";
import {
  type ByteType,
  type DecodeMatrixDialect,
  decodeMatrixDialect,
  FACTOR_LINES,
} from "./kv-decode-matrix-dialect.ts";
import { KV_GROUP, type KvFormat, type KvShape } from "./kv-format.ts";
import type { QueryRope } from "./kv-query-rope.wgsl.ts";

/** What a model's kernel is made for. */
export interface DecodeMatrixModel extends QueryRope {
  readonly format: KvFormat;
  readonly shape: KvShape;
  /** Query heads: a multiple of shape.kvHeads. */
  readonly heads: number;
  readonly maxPages: number;
  /** Factor of the logits. */
  readonly scale: number;
  readonly dialect: "device" | "emulated";
}

export interface DecodeMatrixTemplate extends DecodeMatrixModel {
  /** Query heads of one workgroup, at most heads / kvHeads. */
  readonly queries: number;
}

/** Channels of K that are staged at once: 32 were slower, 128 leave fewer workgroups an SM. */
export const KEY_CHANNELS = 64;

/** Largest folded query as an integer: leaves room for the borrow of signed low bytes. */
export const QUERY_LIMIT = 32000;
/** 1.5 * 2^23 rounds to an integer in the low mantissa bits; 0x8080 makes both bytes non-negative. */
export const QUERY_ROUNDING = 12582912 + 0x8080;
/** Largest folded weight as an integer, and the number that rounds to one. */
export const WEIGHT_LIMIT = 65500;
export const WEIGHT_ROUNDING = 8388608;

/** Queries of one factor operand: each takes a line for high bytes and one for low bytes. */
export const TILE_QUERIES = FACTOR_LINES / 2;

/** Vec4s of a line of 32 codes (bytes) in workgroup memory: padded, so that 8 lines meet different banks. */
export const CODE_STRIDE = 3;
/** Vec4s from one tile of V codes (16 lines) to the next: padding moves the next part by 8 banks. */
export const VALUE_TILE = 16 * CODE_STRIDE + 2;
/** Vec4s of the 8 sums of a code. */
export const SUM_STRIDE = 2;
/** Vec4s of a line of p factors. */
export const WEIGHT_STRIDE = 2;

export interface Plan {
  readonly dialect: DecodeMatrixDialect;
  readonly template: DecodeMatrixTemplate;
  readonly d: number;
  readonly queries: number;
  /** Factor operands. */
  readonly tiles: number;
  readonly parts: number;
  /** Threads that each own four words of meta. */
  readonly metaLanes: number;
  /** Vec4s of a token of staged K codes, and of a line of folded queries. */
  readonly keyStride: number;
  readonly queryStride: number;
  /** Offsets into the staged array, in vec4s; sums and p take the place of codes that are done with. */
  readonly codes: number;
  readonly factors: number;
  readonly zeros: number;
  readonly stagedSize: number;
  /** Parts whose sums fit at once over codes and factors. */
  readonly partsAtOnce: number;
  /** Vec4s from the p factors of one part to the next: padding moves the next part by 8 banks. */
  readonly weightPart: number;
}

export function planOf(template: DecodeMatrixTemplate): Plan {
  const { shape, queries } = template;
  const d = shape.headDim;
  const tiles = Math.ceil(queries / TILE_QUERIES);
  const parts = d / KV_GROUP;
  const keyStride = KEY_CHANNELS / 16 + 1;
  const queryStride = d / 16 + 1;
  const weightPart = tiles * FACTOR_LINES * WEIGHT_STRIDE + 2;
  const sumSize = tiles * 32 * SUM_STRIDE;
  const codes = 0;
  const factors = Math.max(32 * keyStride, 2 * VALUE_TILE, sumSize, queries * 8);
  const zeros = factors + Math.max(tiles * FACTOR_LINES * queryStride, parts * weightPart);
  const stagedSize = zeros + 2 * Math.ceil(queries / 4);
  const partsAtOnce = 2 ** Math.floor(Math.log2(Math.min(parts, zeros / sumSize)));
  const metaLanes = d / 4;
  const dialect = decodeMatrixDialect(template.dialect);
  return {
    dialect,
    template,
    d,
    queries,
    tiles,
    parts,
    metaLanes,
    keyStride,
    queryStride,
    codes,
    factors,
    zeros,
    stagedSize,
    partsAtOnce,
    weightPart,
  };
}

/** Line of a query's high byte in the factor operands; the low byte's is TILE_QUERIES further. */
const lineOf = (query: number) => Math.floor(query / TILE_QUERIES) * FACTOR_LINES + (query % TILE_QUERIES);

/** Text: sums of the lane's code at `offset` of factor tile `t`: high (0) or low (1) bytes of its queries. */
export const sumsAt = (offset: number, t: number, half: 0 | 1) =>
  `staged[${offset + t * 32 * SUM_STRIDE + half}u + lane * ${SUM_STRIDE}u]`;

/** Component of a tile's vectors that belongs to a query, and the tile. */
export const tileOf = (query: number) => Math.floor(query / TILE_QUERIES);
export const placeOf = (query: number) => "xyzw"[query % TILE_QUERIES] as string;

/** Statement: sums of code tile `n` (of two) of factor tile `t` go to `offset`. */
export function storeSums(
  { dialect }: Plan,
  type: ByteType,
  offset: number,
  t: number,
  n: number,
  sum: string,
): string {
  return dialect.store(type, "staged", `${offset + (t * 2 + n) * 16 * SUM_STRIDE}u`, SUM_STRIDE, sum);
}

/** Stores the two bytes of each of a query's four rounded factors (`pieces`: vec2u) as words of two lines. */
export function storePieces(pieces: string, at: (line: number) => string, component: string, query: number): string {
  const line = lineOf(query);
  return `{ let w = ${pieces}; staged[${at(line)}][${component}] = w.x; staged[${at(line + TILE_QUERIES)}][${component}] = w.y; }`;
}

/** Module functions of factors and meta. */
export const FACTOR_FUNCTIONS = `
// Four rounded factors as bytes in order: high ones, low ones.
fn pieces(t: vec4f) -> vec2u {
  let u = bitcast<vec4u>(t);
  let even = (u.x & 0xffffu) | (u.z << 16u);
  let odd = (u.y & 0xffffu) | (u.w << 16u);
  let high = ((even >> 8u) & 0x00ff00ffu) | (odd & 0xff00ff00u);
  let low = (even & 0x00ff00ffu) | ((odd << 8u) & 0xff00ff00u);
  return vec2u(high, low);
}
fn scales(words: vec4u) -> vec4f { return vec4f(unpack2x16float(words.x).x, unpack2x16float(words.y).x, unpack2x16float(words.z).x, unpack2x16float(words.w).x); }
fn zeroPoints(words: vec4u) -> vec4f { return vec4f(unpack2x16float(words.x).y, unpack2x16float(words.y).y, unpack2x16float(words.z).y, unpack2x16float(words.w).y); }
fn largest(x: vec4f) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }`;

/** Bytes of a code word: code j of each of its four bytes, shifted down. */
export const fields = (word: string, bits: number, j: number) =>
  `(${j === 0 ? word : `(${word} >> ${bits * j}u)`} & ${bits === 2 ? "0x03030303u" : "0x0f0f0f0fu"})`;

/**
 * Sums up to 8 values over all lanes: halves of the lanes go on with halves of the values. Afterwards lanes
 * i * (32 / size) to the next such hold value i in `name`. Returns the text and that size, a power of two.
 */
export function sumTogether(name: string, values: readonly string[]): { readonly text: string; readonly size: number } {
  const size = 2 ** Math.ceil(Math.log2(values.length));
  const lines: string[] = [];
  let list: readonly string[] = values;
  let mask = 16;
  for (let count = size; count > 1; count /= 2) {
    const half = count / 2;
    const from = list;
    const at = mask;
    lines.push(`let ${name}b${at} = (lane & ${at}u) != 0u;`);
    list = range(half).map((i) => {
      const [a, b] = [from[i] ?? "0.0", from[i + half] ?? "0.0"];
      const next = `${name}m${at}i${i}`;
      lines.push(
        `let ${next} = select(${a}, ${b}, ${name}b${at}) + bitcast<f32>(laneXor(bitcast<u32>(select(${b}, ${a}, ${name}b${at})), ${at}u, lane));`,
      );
      return next;
    });
    mask /= 2;
  }
  lines.push(`var ${name} = ${list[0]};`);
  for (; mask >= 1; mask /= 2) {
    lines.push(`${name} += bitcast<f32>(laneXor(bitcast<u32>(${name}), ${mask}u, lane));`);
  }
  return { text: lines.join("\n    "), size };
}
