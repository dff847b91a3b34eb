/**
 * Text that turns stored weights of any encoding into f16 while a matrix kernel stages them: a unit is fetched from
 * storage into registers (to be kept there while the kernel multiplies), and later written as vec4s of 8 halves.
 *
 * Needs these bindings: `codes: array<vec4<u32>>` and `scales: array<u32>`, in layout `rows` ([output][word]), with K a
 * multiple of 32, so that rows are whole vec4s.
 *
 * Codes become halves by their place in the mantissa of a power of two, exactly; scales that were f16 in the file are
 * applied in f16 (one rounding), the others in f32 with one rounding at the end. Float weights beyond ±65504 are clamped.
 */
import { PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import type { WeightEncoding } from "./weight-encoding.ts";

/** One register of a fetched unit. */
export interface WeightField {
  readonly name: string;
  readonly type: "vec4<u32>" | "vec2<u32>" | "u32";
}

/** What one thread fetches at a time of one output's row. */
export interface MatrixWeightUnit {
  /** Columns of a unit: 8, 16 or 32. */
  readonly columns: 8 | 16 | 32;
  readonly fields: readonly WeightField[];
  /**
   * Expressions of the fields, in their order.
   * @param output text: index of the output. @param unit text: index of the unit in its row (column / columns).
   * @param k text: K as u32.
   */
  fetch(output: string, unit: string, k: string): readonly string[];
  /** The same; `at` is a name or constant: index of the unit in the whole matrix, output * (K / columns) + unit. */
  fetchAt(at: string): readonly string[];
  /** Expressions (`vec4<u32>`, 8 halves each, columns in order) from texts of the fields, in their order: columns / 8. */
  halves(fields: readonly string[]): readonly string[];
  /** Module-scope functions that the expressions call; may hold `PACK_HALVES_WGSL`. */
  readonly functions: string;
}

const CODES: WeightField = { name: "codes", type: "vec4<u32>" };

function floatUnit(format: "f32" | "f16" | "bf16"): MatrixWeightUnit {
  switch (format) {
    case "f16":
      return {
        columns: 8,
        fields: [CODES],
        fetch: (output, unit, k) => [`codes[${output} * (${k} / 8u) + ${unit}]`],
        fetchAt: (at) => [`codes[${at}]`],
        halves: ([codes]) => [`${codes}`],
        functions: "",
      };
    case "bf16":
      return {
        columns: 8,
        fields: [CODES],
        fetch: (output, unit, k) => [`codes[${output} * (${k} / 8u) + ${unit}]`],
        fetchAt: (at) => [`codes[${at}]`],
        halves: ([codes]) => [`halvesOfBrain(${codes})`],
        functions: `${PACK_HALVES_WGSL}
fn halvesOfBrain(c: vec4<u32>) -> vec4<u32> {
  let low = bitcast<vec4f>(vec4<u32>(c.x << 16u, c.x & 0xffff0000u, c.y << 16u, c.y & 0xffff0000u));
  let high = bitcast<vec4f>(vec4<u32>(c.z << 16u, c.z & 0xffff0000u, c.w << 16u, c.w & 0xffff0000u));
  return vec4<u32>(packHalves(low), packHalves(high));
}
`,
      };
    case "f32":
      return {
        columns: 8,
        fields: [CODES, { name: "more", type: "vec4<u32>" }],
        fetch: (output, unit, k) => [0, 1].map((half) => `codes[${output} * (${k} / 4u) + (${unit}) * 2u + ${half}u]`),
        fetchAt: (at) => [`codes[${at} * 2u]`, `codes[${at} * 2u + 1u]`],
        halves: ([low, high]) => [`vec4<u32>(packHalves(bitcast<vec4f>(${low})), packHalves(bitcast<vec4f>(${high})))`],
        functions: PACK_HALVES_WGSL,
      };
  }
}

/** Scale and minimum of a group as stored: one u32, or two. */
function scaleField({ scales }: WeightEncoding): WeightField {
  return { name: "scale", type: scales === "pair32" ? "vec2<u32>" : "u32" };
}

function fetchScale({ scales, group }: WeightEncoding, output: string, column: string, k: string): string {
  return scaleAt({ scales }, `(${output} * (${k} / ${group}u) + (${column}) / ${group}u)`);
}

/** Scale of group `at` of the whole matrix. */
function scaleAt({ scales }: Pick<WeightEncoding, "scales">, at: string): string {
  return scales === "pair32" ? `vec2<u32>(scales[${at} * 2u], scales[${at} * 2u + 1u])` : `scales[${at}]`;
}

/** Whether the scales were f16 in the file: then f16 arithmetic loses nothing. */
function halfScales({ scales, group }: WeightEncoding): boolean {
  return scales === "pair16" || (scales === "scale32" && group === 32);
}

/** `scaleOf`: vec2f of scale and minimum in f32; where `native`, vec2<f16>. */
function scaleFunction({ scales }: WeightEncoding, native: boolean): string {
  const type = scales === "pair32" ? "vec2<u32>" : "u32";
  const value = {
    none: "",
    scale32: native ? "vec2<f16>(f16(bitcast<f32>(stored)), 0.0h)" : "vec2f(bitcast<f32>(stored), 0.0)",
    pair16: native ? "bitcast<vec2<f16>>(stored)" : "unpack2x16float(stored)",
    pair32: "bitcast<vec2f>(stored)",
  }[scales];
  return `
fn scaleOf(stored: ${type}) -> ${native ? "vec2<f16>" : "vec2f"} { return ${value}; }
`;
}

/** Four codes of a word, `even` and `odd` bytes apart as pairs of halves, scaled and put in order. */
const NATIVE_ORDER = `
fn scaledInOrder(even: vec2<f16>, odd: vec2<f16>, scale: vec2<f16>) -> vec2<u32> {
  let a = fma(even, vec2<f16>(scale.x), vec2<f16>(scale.y));
  let b = fma(odd, vec2<f16>(scale.x), vec2<f16>(scale.y));
  return vec2<u32>(bitcast<u32>(vec2<f16>(a.x, b.x)), bitcast<u32>(vec2<f16>(a.y, b.y)));
}
`;

/** 0x6400 is 1024 as a half, whose last bit counts 1; 0x5400 is 64, whose last bit counts 1/16. */
const NATIVE: Record<"q8" | "q4", string> = {
  q8: `${NATIVE_ORDER}
fn signedBytes(word: u32, scale: vec2<f16>) -> vec2<u32> {
  let even = bitcast<vec2<f16>>((word & 0x00ff00ffu) ^ 0x64806480u) - vec2<f16>(1152.0h);
  let odd = bitcast<vec2<f16>>(((word >> 8u) & 0x00ff00ffu) ^ 0x64806480u) - vec2<f16>(1152.0h);
  return scaledInOrder(even, odd, scale);
}
`,
  q4: `${NATIVE_ORDER}
fn lowNibbles(word: u32, scale: vec2<f16>) -> vec2<u32> {
  let even = bitcast<vec2<f16>>((word & 0x000f000fu) | 0x64006400u) - vec2<f16>(1024.0h);
  let odd = bitcast<vec2<f16>>(((word >> 8u) & 0x000f000fu) | 0x64006400u) - vec2<f16>(1024.0h);
  return scaledInOrder(even, odd, scale);
}
fn highNibbles(word: u32, scale: vec2<f16>) -> vec2<u32> {
  let even = bitcast<vec2<f16>>((word & 0x00f000f0u) | 0x54005400u) - vec2<f16>(64.0h);
  let odd = bitcast<vec2<f16>>(((word >> 8u) & 0x00f000f0u) | 0x54005400u) - vec2<f16>(64.0h);
  return scaledInOrder(even, odd, scale);
}
`,
};

/** 2²³ + code as bits of an f32. */
const FLOAT_ORDER = `
fn scaledInOrder(biased: vec4<u32>, bias: f32, scale: vec2f) -> vec2<u32> {
  let code = bitcast<vec4f>(biased | vec4<u32>(0x4b000000u)) - vec4f(bias);
  let value = fma(code, vec4f(scale.x), vec4f(scale.y));
  return vec2<u32>(pack2x16float(value.xy), pack2x16float(value.zw));
}
`;

const FLOAT: Record<"q8" | "q4", string> = {
  q8: `${FLOAT_ORDER}
fn signedBytes(word: u32, scale: vec2f) -> vec2<u32> {
  let biased = (vec4<u32>(word ^ 0x80808080u) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u);
  return scaledInOrder(biased, 8388736.0, scale);
}
`,
  q4: `${FLOAT_ORDER}
fn lowNibbles(word: u32, scale: vec2f) -> vec2<u32> {
  return scaledInOrder((vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(15u), 8388608.0, scale);
}
fn highNibbles(word: u32, scale: vec2f) -> vec2<u32> { return lowNibbles(word >> 4u, scale); }
`,
};

function codedUnit(encoding: WeightEncoding, format: "q8" | "q4", shaderF16: boolean): MatrixWeightUnit {
  const native = shaderF16 && halfScales(encoding);
  const columns = format === "q8" ? 16 : 32;
  const pair = (first: string, second: string, decode: string, scale: string) =>
    `vec4<u32>(${decode}(${first}, scaleOf(${scale})), ${decode}(${second}, scaleOf(${scale})))`;
  return {
    columns,
    fields: [CODES, scaleField(encoding)],
    fetch: (output, unit, k) => [
      `codes[${output} * (${k} / ${columns}u) + ${unit}]`,
      fetchScale(encoding, output, `(${unit}) * ${columns}u`, k),
    ],
    fetchAt: (at) => [`codes[${at}]`, scaleAt(encoding, columns === encoding.group ? at : `(${at} / 2u)`)],
    halves: ([codes, scale]) =>
      (format === "q8" ? ["signedBytes"] : ["lowNibbles", "highNibbles"]).flatMap((decode) => [
        pair(`${codes}.x`, `${codes}.y`, decode, `${scale}`),
        pair(`${codes}.z`, `${codes}.w`, decode, `${scale}`),
      ]),
    functions: `${scaleFunction(encoding, native)}${(native ? NATIVE : FLOAT)[format]}`,
  };
}

/** @param shaderF16 whether the kernel may compute in f16 (`enable f16;` is the caller's). */
export function matrixWeightUnit(encoding: WeightEncoding, shaderF16: boolean): MatrixWeightUnit {
  const { format } = encoding;
  return format === "q8" || format === "q4" ? codedUnit(encoding, format, shaderF16) : floatUnit(format);
}
