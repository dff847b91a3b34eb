/**
 * Linear layer for GPUs, weights in layout `rows` ([output][word]).
 *
 * Decode: 32 threads share a few outputs; each takes every 32nd vec4 of code words of their rows, then the lanes' sums are
 * added in a fixed order. Prefill: a tile of 64 rows × 64 outputs in workgroup memory, 4 × 4 a thread, K walked in order.
 * Products are accumulated with `fma` in one fixed order per output, so no result depends on the number of rows.
 */

import { LINEAR_PARAMETERS, LINEAR_STORE } from "./linear-parameters.wgsl.ts";
import { codeWordsPerGroup, type WeightEncoding } from "./weight-encoding.ts";

function range(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index);
}

const BINDINGS = (codesType: string) => `
@group(0) @binding(0) var<storage, read> input: array<vec4f>;
@group(0) @binding(1) var<storage, read> codes: array<${codesType}>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;
${LINEAR_STORE}`;

/** Columns of one vec4 of code words. */
function columnsPerUnit(encoding: WeightEncoding): number {
  return { f32: 4, f16: 8, bf16: 8, q8: 16, q4: 32 }[encoding.format];
}

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

/**
 * The vec4f values (codes, where there are scales) of one vec4 of words `c`, in the order of their columns.
 * Small integers become floats by their place in the mantissa of 2²³: exact, and cheaper than a conversion.
 */
function unitVectors(encoding: WeightEncoding, c: string): string[] {
  const words = ["x", "y", "z", "w"].map((component) => `${c}.${component}`);
  switch (encoding.format) {
    case "f32":
      return [`bitcast<vec4f>(${c})`];
    case "f16":
      return [0, 2].map((w) => `vec4f(unpack2x16float(${words[w]}), unpack2x16float(${words[w + 1]}))`);
    case "bf16":
      return [0, 2].map((w) => {
        const [low, high] = [words[w], words[w + 1]];
        return `bitcast<vec4f>(vec4u(${low} << 16u, ${low} & 0xffff0000u, ${high} << 16u, ${high} & 0xffff0000u))`;
      });
    case "q8":
      return words.map((word) => `signedBytes(${word})`);
    case "q4":
      return [...words.map((word) => `nibbles(${word})`), ...words.map((word) => `nibbles(${word} >> 4u)`)];
  }
}

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
  const unit = columnsPerUnit(encoding);
  const vectors = range(unit / 4);
  const scaled = encoding.scales !== "none";
  const affine = encoding.scales === "pair16" || encoding.scales === "pair32";
  const unitsPerGroup = scaled ? encoding.group / unit : 1;
  const sums = rows.flatMap((m) => outputs.map((r) => `a${m}_${r}`));
  const chain = (r: number) =>
    vectors.reduce(
      (sum, v) => ["x", "y", "z", "w"].reduce((s, c) => `fma(w${r}_${v}.${c}, x${v}.${c}, ${s})`, sum),
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
${BINDINGS("vec4u")}
${UNPACK[encoding.format]}
${scaleFunction(encoding)}
var<workgroup> shared_sums: array<f32, ${ROWS_DECODE_THREADS * sums.length}>;

@compute @workgroup_size(${ROWS_DECODE_THREADS})
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_index) lane: u32,
  ${subgroups ? "@builtin(subgroup_size) subgroupSize: u32," : ""}
) {
  let units = parameters.k / ${unit}u;
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
      ${vectors.map((v) => `let x${v} = input[row${m} + u * ${unit / 4}u + ${v}u];`).join("\n      ")}
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
const PREFILL_THREADS = 256;
const PREFILL_DEPTH = 32;

/** Statements that decode word `word` of the tile's row into workgroup memory. */
function stageWord(encoding: WeightEncoding): string {
  const put = (offset: string, value: string) =>
    `weightTile[(${offset}) * ${ROWS_PREFILL_TILE}u + output_index] = ${value};`;
  const four = (offset: string, vector: string) =>
    `let f${offset.length} = ${vector}; ${["x", "y", "z", "w"].map((c, k) => put(`${offset} + ${k}u`, `f${offset.length}.${c}`)).join(" ")}`;
  const scale =
    encoding.scales === "none"
      ? ""
      : `let s = scaleOf(n, (first + word * ${encoding.group / codeWordsPerGroup(encoding)}u) / ${encoding.group}u, parameters.k / ${encoding.group}u);`;
  switch (encoding.format) {
    case "f32":
      return put("word", "bitcast<f32>(code)");
    case "f16":
      return `let pair = unpack2x16float(code); ${put("word * 2u", "pair.x")} ${put("word * 2u + 1u", "pair.y")}`;
    case "bf16":
      return `${put("word * 2u", "bitcast<f32>(code << 16u)")} ${put("word * 2u + 1u", "bitcast<f32>(code & 0xffff0000u)")}`;
    case "q8":
      return `${scale} ${four("word * 4u", "fma(signedBytes(code), vec4f(s.x), vec4f(s.y))")}`;
    case "q4":
      return `${scale} ${four("word * 4u", "fma(nibbles(code), vec4f(s.x), vec4f(s.y))")}
      ${four("word * 4u + 16u", "fma(nibbles(code >> 4u), vec4f(s.x), vec4f(s.y))")}`;
  }
}

/** Prefill kernel; grid: x tiles of 64 outputs, y tiles of 64 rows. */
export function linearRowsPrefillWgsl(encoding: WeightEncoding): string {
  const columnsPerWord = columnsPerUnit(encoding) / 4;
  const words = PREFILL_DEPTH / columnsPerWord;
  const four = range(4);
  const component = ["x", "y", "z", "w"];
  return `requires immediate_address_space;
${LINEAR_PARAMETERS}
${BINDINGS("u32")}
${UNPACK[encoding.format]}
${scaleFunction(encoding)}
var<workgroup> inputTile: array<f32, ${PREFILL_DEPTH * ROWS_PREFILL_TILE}>;
var<workgroup> weightTile: array<f32, ${PREFILL_DEPTH * ROWS_PREFILL_TILE}>;

@compute @workgroup_size(${PREFILL_THREADS})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let firstOutput = group.x * ${ROWS_PREFILL_TILE}u;
  let firstRow = group.y * ${ROWS_PREFILL_TILE}u;
  let tx = lane % 16u;
  let ty = lane / 16u;
  let rowWords = parameters.k / ${columnsPerWord}u;
  ${four.map((m) => `var a${m} = vec4f();`).join(" ")}
  for (var first = 0u; first < parameters.k; first += ${PREFILL_DEPTH}u) {
    for (var i = lane; i < ${(ROWS_PREFILL_TILE * PREFILL_DEPTH) / 4}u; i += ${PREFILL_THREADS}u) {
      let row = min(firstRow + i / ${PREFILL_DEPTH / 4}u, parameters.rows - 1u);
      let k = (i % ${PREFILL_DEPTH / 4}u) * 4u;
      var value = vec4f();
      if (first + k < parameters.k) { value = input[(row * parameters.k + first + k) / 4u]; }
      let at = k * ${ROWS_PREFILL_TILE}u + i / ${PREFILL_DEPTH / 4}u;
      ${component.map((c, k) => `inputTile[at + ${k * ROWS_PREFILL_TILE}u] = value.${c};`).join(" ")}
    }
    for (var i = lane; i < ${ROWS_PREFILL_TILE * words}u; i += ${PREFILL_THREADS}u) {
      let output_index = i / ${words}u;
      let word = i % ${words}u;
      let n = min(firstOutput + output_index, parameters.n - 1u);
      var code = 0u;
      if (first + word * ${columnsPerWord}u < parameters.k) { code = codes[n * rowWords + first / ${columnsPerWord}u + word]; }
      ${stageWord(encoding)}
    }
    workgroupBarrier();
    for (var k = 0u; k < ${PREFILL_DEPTH}u; k++) {
      let atInput = k * ${ROWS_PREFILL_TILE}u + ty * 4u;
      let atWeight = k * ${ROWS_PREFILL_TILE}u + tx * 4u;
      let w = vec4f(weightTile[atWeight], weightTile[atWeight + 1u], weightTile[atWeight + 2u], weightTile[atWeight + 3u]);
      ${four.map((m) => `a${m} = fma(vec4f(inputTile[atInput + ${m}u]), w, a${m});`).join("\n      ")}
    }
    workgroupBarrier();
  }
  ${four
    .map(
      (m) => `if (firstRow + ty * 4u + ${m}u < parameters.rows) {
    let at = (firstRow + ty * 4u + ${m}u) * parameters.outputStride + parameters.outputOffset + firstOutput + tx * 4u;
    ${four
      .map((j) => `if (firstOutput + tx * 4u + ${j}u < parameters.n) { store(at + ${j}u, a${m}.${component[j]}); }`)
      .join("\n    ")}
  }`,
    )
    .join("\n  ")}
}
`;
}
