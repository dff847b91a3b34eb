/**
 * Linear layer for GPUs, weights in layout `rows` ([output][word]).
 *
 * Decode: 32 threads share a few outputs; each takes every 32nd unit of their rows, then the lanes' sums are
 * added in a fixed order. Prefill: a tile of 64 rows × 64 outputs in workgroup memory, 4 × 4 a thread, K walked in order.
 * Products are accumulated with `fma` in one fixed order per output, so no result depends on the number of rows.
 */

import { LINEAR_PARAMETERS, LINEAR_STORE } from "./linear-parameters.wgsl.ts";
import type { WeightEncoding } from "./weight-encoding.ts";

function range(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index);
}

const COMPONENTS = ["x", "y", "z", "w"] as const;

const BINDINGS = (codesType: string) => `
@group(0) @binding(0) var<storage, read> input: array<vec4f>;
@group(0) @binding(1) var<storage, read> codes: array<${codesType}>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;
${LINEAR_STORE}`;

/** What a lane takes at a time: the fewest words that meet whole vec4s of the input, so that lanes read side by side. */
interface Unit {
  readonly type: "u32" | "vec2u" | "vec4u";
  readonly columns: number;
}

const UNITS: Record<WeightEncoding["format"], Unit> = {
  f32: { type: "vec4u", columns: 4 },
  f16: { type: "vec2u", columns: 4 },
  bf16: { type: "vec2u", columns: 4 },
  q8: { type: "u32", columns: 4 },
  q4: { type: "u32", columns: 8 },
};

/** Scale and minimum of group `g` of row `r` as a vec2f; `groups` groups a row. */
function scaleFunction(encoding: WeightEncoding): string {
  switch (encoding.scales) {
    case "none":
      return "";
    case "scale32":
      return "fn scaleOf(r: u32, g: u32, groups: u32) -> vec2f { return vec2f(bitcast<f32>(scales[r * groups + g]), 0.0); }";
    case "pair16":
      return "fn scaleOf(r: u32, g: u32, groups: u32) -> vec2f { return unpack2x16float(scales[r * groups + g]); }";
    case "pair32":
      return `fn scaleOf(r: u32, g: u32, groups: u32) -> vec2f {
  let at = (r * groups + g) * 2u;
  return vec2f(bitcast<f32>(scales[at]), bitcast<f32>(scales[at + 1u]));
}`;
  }
}

/** The vec4f values (codes, where there are scales) of one unit `c`. */
function unitVectors(encoding: WeightEncoding, c: string): string[] {
  switch (encoding.format) {
    case "f32":
      return [`bitcast<vec4f>(${c})`];
    case "f16":
      return [`vec4f(unpack2x16float(${c}.x), unpack2x16float(${c}.y))`];
    case "bf16":
      return [`bitcast<vec4f>(vec4u(${c}.x << 16u, ${c}.x & 0xffff0000u, ${c}.y << 16u, ${c}.y & 0xffff0000u))`];
    case "q8":
      return [`signedBytes(${c})`];
    case "q4":
      return [`nibbles(${c})`, `nibbles(${c} >> 4u)`];
  }
}

/** Index of the vec4 of input that vector `v` of unit `u` meets, from the start of the row. */
function unitInput(encoding: WeightEncoding, v: number): string {
  return encoding.format === "q4" ? `(u / 4u) * 8u + u % 4u + ${v * 4}u` : "u";
}

/** Small integers become floats by their place in the mantissa of 2²³: exact, and cheaper than a conversion. */
const UNPACK: Record<WeightEncoding["format"], string> = {
  f32: "",
  f16: "",
  bf16: "",
  q8: `
fn signedBytes(word: u32) -> vec4f {
  let biased = (vec4u(word ^ 0x80808080u) >> vec4u(0u, 8u, 16u, 24u)) & vec4u(255u);
  return bitcast<vec4f>(biased | vec4u(0x4b000000u)) - vec4f(8388736.0);
}`,
  q4: `
fn nibbles(word: u32) -> vec4f {
  let codes = (vec4u(word) >> vec4u(0u, 8u, 16u, 24u)) & vec4u(15u);
  return bitcast<vec4f>(codes | vec4u(0x4b000000u)) - vec4f(8388608.0);
}`,
};

export interface RowsDecodeTile {
  /** Outputs of one workgroup. */
  readonly outputs: number;
  /** Rows of one workgroup. */
  readonly rows: number;
}

/** Threads of the decode kernel: one subgroup on NVIDIA, four on lavapipe. */
export const ROWS_DECODE_THREADS = 32;

/** Adds the lanes' sums: by subgroups, then in the order of the subgroups; by all lanes in order where there are none. */
function reduction(sums: readonly string[], subgroups: boolean): string {
  const count = sums.length;
  const stored = sums.map((sum, index) => `shared_sums[slot * ${count}u + ${index}u] = ${sum};`).join(" ");
  return subgroups
    ? `${sums.map((sum) => `${sum} = subgroupAdd(${sum});`).join(" ")}
  let slot = lane / subgroupSize;
  if (lane % subgroupSize == 0u) { ${stored} }
  let slots = (${ROWS_DECODE_THREADS}u + subgroupSize - 1u) / subgroupSize;`
    : `let slot = lane;
  ${stored}
  let slots = ${ROWS_DECODE_THREADS}u;`;
}

/** Decode kernel; grid: x tiles of outputs, y tiles of rows. */
export function linearRowsDecodeWgsl(encoding: WeightEncoding, tile: RowsDecodeTile, subgroups: boolean): string {
  const outputs = range(tile.outputs);
  const rows = range(tile.rows);
  const unit = UNITS[encoding.format];
  const vectors = range(unit.columns / 4);
  const scaled = encoding.scales !== "none";
  const affine = encoding.scales === "pair16" || encoding.scales === "pair32";
  const unitsPerGroup = scaled ? encoding.group / unit.columns : 1;
  const sums = rows.flatMap((m) => outputs.map((r) => `a${m}_${r}`));
  const chain = (r: number) =>
    vectors.reduce(
      (sum, v) => COMPONENTS.reduce<string>((s, c) => `fma(w${r}_${v}.${c}, x${v}.${c}, ${s})`, sum),
      "0.0",
    );
  const product = (m: number, r: number) => {
    const target = `a${m}_${r}`;
    if (!scaled) return `${target} += ${chain(r)};`;
    const sum = `${target} = fma(s${r}.x, ${chain(r)}, ${target});`;
    return affine ? `${sum} ${target} = fma(s${r}.y, xs, ${target});` : sum;
  };
  return `requires immediate_address_space;
${subgroups ? "enable subgroups;" : ""}
${LINEAR_PARAMETERS}
${BINDINGS(unit.type)}
${UNPACK[encoding.format]}
${scaleFunction(encoding)}
var<workgroup> shared_sums: array<f32, ${ROWS_DECODE_THREADS * sums.length}>;

@compute @workgroup_size(${ROWS_DECODE_THREADS})
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_index) lane: u32,
  ${subgroups ? "@builtin(subgroup_size) subgroupSize: u32," : ""}
) {
  let units = parameters.k / ${unit.columns}u;
  let groups = parameters.k / ${encoding.group}u;
  let firstOutput = group.x * ${tile.outputs}u;
  let firstRow = group.y * ${tile.rows}u;
  ${outputs.map((r) => `let n${r} = min(firstOutput + ${r}u, parameters.n - 1u);`).join("\n  ")}
  ${rows.map((m) => `let row${m} = min(firstRow + ${m}u, parameters.rows - 1u) * (parameters.k / 4u);`).join("\n  ")}
  ${sums.map((sum) => `var ${sum} = 0.0;`).join(" ")}
  for (var u = lane; u < units; u += ${ROWS_DECODE_THREADS}u) {
    ${outputs.map((r) => `let c${r} = codes[n${r} * units + u];`).join("\n    ")}
    ${scaled ? outputs.map((r) => `let s${r} = scaleOf(n${r}, u / ${unitsPerGroup}u, groups);`).join("\n    ") : ""}
    ${outputs.flatMap((r) => unitVectors(encoding, `c${r}`).map((vector, v) => `let w${r}_${v} = ${vector};`)).join("\n    ")}
    ${rows
      .map(
        (m) => `{
      ${vectors.map((v) => `let x${v} = input[row${m} + ${unitInput(encoding, v)}];`).join("\n      ")}
      ${affine ? `let xt = ${vectors.map((v) => `x${v}`).join(" + ")}; let xs = (xt.x + xt.y) + (xt.z + xt.w);` : ""}
      ${outputs.map((r) => product(m, r)).join("\n      ")}
    }`,
      )
      .join("\n    ")}
  }
  ${reduction(sums, subgroups)}
  workgroupBarrier();
  for (var cell = lane; cell < ${sums.length}u; cell += ${ROWS_DECODE_THREADS}u) {
    let m = firstRow + cell / ${tile.outputs}u;
    let n = firstOutput + cell % ${tile.outputs}u;
    if (m < parameters.rows && n < parameters.n) {
      var sum = 0.0;
      for (var other = 0u; other < slots; other++) { sum += shared_sums[other * ${sums.length}u + cell]; }
      store(m * parameters.outputStride + parameters.outputOffset + n, sum);
    }
  }
}
`;
}

/** Outputs and rows of the prefill tile. */
export const ROWS_PREFILL_TILE = 64;
const TILE_VECTORS = ROWS_PREFILL_TILE / 4;
const PREFILL_THREADS = 256;
/** Columns of the tile: one group of every encoding. */
const PREFILL_DEPTH = 32;
/** Threads that bring inputs; the rest bring weights. */
const INPUT_THREADS = 128;

/** Stores, for each of four columns, the vec4 across four rows (`names` are four vec4s along the columns). */
function storeTransposed(tile: string, column: string, quad: string, names: readonly string[]): string {
  return COMPONENTS.map(
    (c, k) =>
      `${tile}[(${column} + ${k}u) * ${TILE_VECTORS}u + ${quad}] = vec4f(${names.map((name) => `${name}.${c}`).join(", ")});`,
  ).join("\n      ");
}

/** Brings one unit of four outputs into workgroup memory; columns behind K become zeros. */
function stageWeights(encoding: WeightEncoding): string {
  const unit = UNITS[encoding.format];
  const scaled = encoding.scales !== "none";
  const outputs = range(4);
  const decode = outputs.map((r) => {
    const at = `min(firstOutput + quad * 4u + ${r}u, parameters.n - 1u)`;
    const vectors = unitVectors(encoding, `c${r}`).map((vector) =>
      scaled ? `fma(${vector}, vec4f(s${r}.x), vec4f(s${r}.y))` : vector,
    );
    return `let n${r} = ${at};
        let c${r} = codes[n${r} * units + u];
        ${scaled ? `let s${r} = scaleOf(n${r}, u / ${encoding.group / unit.columns}u, parameters.k / ${encoding.group}u);` : ""}
        ${vectors.map((vector, v) => `w${r}_${v} = ${vector};`).join(" ")}`;
  });
  const vectors = range(unit.columns / 4);
  return `let quad = (lane - ${INPUT_THREADS}u) % ${TILE_VECTORS}u;
      let step = (lane - ${INPUT_THREADS}u) / ${TILE_VECTORS}u;
      let u = first / ${unit.columns}u + step;
      ${outputs.flatMap((r) => vectors.map((v) => `var w${r}_${v} = vec4f();`)).join(" ")}
      if (u < units) {
        ${decode.join("\n        ")}
      }
      ${vectors
        .map((v) =>
          storeTransposed(
            "weightTile",
            `step * 4u + ${v * 16}u`,
            "quad",
            outputs.map((r) => `w${r}_${v}`),
          ),
        )
        .join("\n      ")}`;
}

/** Prefill kernel; grid: x tiles of 64 outputs, y tiles of 64 rows. */
export function linearRowsPrefillWgsl(encoding: WeightEncoding): string {
  const unit = UNITS[encoding.format];
  const stagingThreads = (PREFILL_DEPTH / unit.columns) * TILE_VECTORS;
  const four = range(4);
  return `requires immediate_address_space;
${LINEAR_PARAMETERS}
${BINDINGS(unit.type)}
${UNPACK[encoding.format]}
${scaleFunction(encoding)}
var<workgroup> inputTile: array<vec4f, ${PREFILL_DEPTH * TILE_VECTORS}>;
var<workgroup> weightTile: array<vec4f, ${PREFILL_DEPTH * TILE_VECTORS}>;

@compute @workgroup_size(${PREFILL_THREADS})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let firstOutput = group.x * ${ROWS_PREFILL_TILE}u;
  let firstRow = group.y * ${ROWS_PREFILL_TILE}u;
  let tx = lane % ${TILE_VECTORS}u;
  let ty = lane / ${TILE_VECTORS}u;
  let units = parameters.k / ${unit.columns}u;
  ${four.map((m) => `var a${m} = vec4f();`).join(" ")}
  for (var first = 0u; first < parameters.k; first += ${PREFILL_DEPTH}u) {
    if (lane < ${INPUT_THREADS}u) {
      let quad = lane % ${TILE_VECTORS}u;
      let column = (lane / ${TILE_VECTORS}u) * 4u;
      ${four.map((m) => `var x${m} = vec4f();`).join(" ")}
      if (first + column < parameters.k) {
        ${four.map((m) => `x${m} = input[(min(firstRow + quad * 4u + ${m}u, parameters.rows - 1u) * parameters.k + first + column) / 4u];`).join("\n        ")}
      }
      ${storeTransposed("inputTile", "column", "quad", ["x0", "x1", "x2", "x3"])}
    } else if (lane < ${INPUT_THREADS + stagingThreads}u) {
      ${stageWeights(encoding)}
    }
    workgroupBarrier();
    for (var k = 0u; k < ${PREFILL_DEPTH}u; k++) {
      let x = inputTile[k * ${TILE_VECTORS}u + ty];
      let w = weightTile[k * ${TILE_VECTORS}u + tx];
      ${four.map((m) => `a${m} = fma(vec4f(x.${COMPONENTS[m]}), w, a${m});`).join("\n      ")}
    }
    workgroupBarrier();
  }
  ${four
    .map(
      (m) => `if (firstRow + ty * 4u + ${m}u < parameters.rows) {
    let at = (firstRow + ty * 4u + ${m}u) * parameters.outputStride + parameters.outputOffset + firstOutput + tx * 4u;
    ${four
      .map((j) => `if (firstOutput + tx * 4u + ${j}u < parameters.n) { store(at + ${j}u, a${m}.${COMPONENTS[j]}); }`)
      .join("\n    ")}
  }`,
    )
    .join("\n  ")}
}
`;
}
