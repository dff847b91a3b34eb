/** What the packed decode kernel is generated from: its template, the sizes that follow, and how codes become f16. */
import { range } from "./kv-attention-template.ts";
import type { LaneExchange } from "./kv-decode-lanes.ts";
import { KV_GROUP, type KvFormat, type KvShape } from "./kv-format.ts";
import { codesPerWord } from "./kv-layout.ts";
import type { QueryRope } from "./kv-query-rope.wgsl.ts";

/** How a code becomes an f16: as a subnormal, or added to 1 where subnormals are flushed. */
export type CodeForm = "subnormal" | "offset";

export interface DecodePackedTemplate extends QueryRope {
  readonly format: KvFormat;
  readonly shape: KvShape;
  /** Query heads: a multiple of shape.kvHeads. */
  readonly heads: number;
  /** Query heads of one workgroup. */
  readonly queries: number;
  readonly maxPages: number;
  /** Factor of the logits. */
  readonly scale: number;
  readonly form: CodeForm;
  readonly exchange: LaneExchange;
  /** Unrolled text also where lanes meet in memory; for tests. */
  readonly unrolled?: boolean;
}

/** Whether the kernel can hold the format and shape. */
export function decodePackedSupports(format: KvFormat, shape: KvShape): boolean {
  return format.keyBits < 16 && format.valueBits < 16 && (shape.headDim === 64 || shape.headDim === 128);
}

/** How codes of `bits` in a word become pairs (i, i + C/2) of f16. */
export interface Unpacking {
  readonly pairs: number;
  /** Statement that prepares a word. */
  prepare(name: string, word: string): string;
  /** Expression: pair i of a prepared word. */
  pair(name: string, i: number): string;
  /** log2 of pair i's unit over the form's unit. */
  place(i: number): number;
  /** log2 of one over the unit of place 0. */
  readonly unit: number;
  /** What a code of zero is, in units. */
  readonly base: number;
  /** log2 of the largest folded factor. */
  readonly top: number;
}

const hex = (x: number) => `0x${(x >>> 0).toString(16)}u`;

function unpacking(bits: number, form: CodeForm): Unpacking {
  const pairs = 16 / bits;
  const mask = ((1 << bits) - 1) * 0x0001_0001;
  if (form === "offset") {
    // The code's field is moved right below the exponent of 1.
    const shift = (i: number) => 10 - bits - i * bits;
    const moved = (name: string, by: number) =>
      by > 0 ? `(${name} << ${by}u)` : by < 0 ? `(${name} >> ${-by}u)` : name;
    return {
      pairs,
      prepare: (name, word) => `let ${name} = ${word};`,
      pair: (name, i) => `bitcast<vec2<f16>>((${moved(name, shift(i))} & ${hex(mask << (10 - bits))}) | 0x3c003c00u)`,
      place: () => 0,
      unit: bits,
      base: 2 ** bits,
      top: 9,
    };
  }
  // The ten bits of a half's mantissa hold this many fields.
  const inPlace = Math.floor(10 / bits);
  return {
    pairs,
    prepare: (name, word) => `let ${name} = ${word}; let ${name}h = ${name} >> ${inPlace * bits}u;`,
    pair: (name, i) =>
      `bitcast<vec2<f16>>(${i < inPlace ? name : `${name}h`} & ${hex(mask << ((i % inPlace) * bits))})`,
    place: (i) => (i % inPlace) * bits,
    unit: 24,
    base: 0,
    top: 14,
  };
}

export interface PackedPlan {
  readonly template: DecodePackedTemplate;
  readonly d: number;
  readonly queries: number;
  readonly parts: number;
  /** Lanes that each own four words of meta; the lanes above repeat them. */
  readonly metaLanes: number;
  readonly key: Unpacking;
  readonly value: Unpacking;
  /** Vec4s of K (V) codes of a group that a lane loads. */
  readonly keyLoads: number;
  readonly valueLoads: number;
  readonly valueWords: number;
  /** Loops instead of unrolled text, where drivers compile slowly. */
  readonly rolled: boolean;
}

export function packedPlan(template: DecodePackedTemplate): PackedPlan {
  const { format, shape, queries, form } = template;
  const d = shape.headDim;
  const keyWords = d / codesPerWord(format.keyBits);
  const valueWords = d / codesPerWord(format.valueBits);
  return {
    template,
    d,
    queries,
    parts: d / KV_GROUP,
    metaLanes: d / 4,
    key: unpacking(format.keyBits, form),
    value: unpacking(format.valueBits, form),
    keyLoads: keyWords / 4,
    valueLoads: valueWords / 4,
    valueWords,
    rolled: template.exchange === "memory" && template.unrolled !== true,
  };
}

/** log2 of the place of the lane's first and second pair, as expressions. */
export function placeFactors({ key }: PackedPlan): string {
  const quads = key.pairs / 2;
  const factor = (odd: number) => {
    const values = range(quads).map((k) => 2 ** -key.place(2 * k + odd));
    if (values.every((value) => value === values[0])) return `${values[0]}`;
    return `array<f32, ${quads}>(${values.join(", ")})[metaLane % ${quads}u]`;
  };
  return `  let place0: f32 = ${factor(0)}; let place1: f32 = ${factor(1)};`;
}

/** Four (scale, zero) words as two vec4f; `base` codes are taken back from the zero. */
export const metaText = (name: string, words: string, base: number) =>
  `let ${name}A = unpack2x16float(${words}.x); let ${name}B = unpack2x16float(${words}.y); let ${name}C = unpack2x16float(${words}.z); let ${name}D = unpack2x16float(${words}.w);
    let ${name}Scale = vec4f(${name}A.x, ${name}B.x, ${name}C.x, ${name}D.x); let ${name}Zero = vec4f(${name}A.y, ${name}B.y, ${name}C.y, ${name}D.y)${base === 0 ? "" : ` - ${name}Scale * ${base}.0`};`;

/** A power of two `raise` that brings the largest of the lanes' values near 2^top, and `back` = 2^unit / raise. */
export const powersText = (name: string, values: string, { top, unit }: Unpacking) =>
  `let ${name}E = max(laneTop(bitcast<u32>(${values}), lane), 0x10000000u) & 0x7f800000u; let ${name}Raise = bitcast<f32>(${hex((254 + top) << 23)} - ${name}E); let ${name}Back = bitcast<f32>(${name}E + ${hex((unit - top) << 23)});`;

export const largest = (v: string) => `max(max(${v}.x, ${v}.y), max(${v}.z, ${v}.w))`;
