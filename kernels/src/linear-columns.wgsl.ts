/**
 * Linear layer for CPU drivers, weights in layout `columns` ([word][output]).
 *
 * A thread owns `tileRows` rows × `tileColumns` outputs and walks K in order; lanes own neighbouring outputs. There is no
 * workgroup memory and no barrier: inputs are the same for all lanes of a workgroup, so the driver loads them once, and
 * each decoded weight is used for every row of the tile. Gathering a word costs this driver more than decoding it.
 * Every output sees the same operations in the same order whatever the tile, so the tile may follow the number of rows;
 * `fma` is written out, since drivers contract as they like.
 */
import { LINEAR_PARAMETERS, LINEAR_STORE } from "./linear-parameters.wgsl.ts";
import { codeWordsPerGroup, scaleWordsPerGroup, type WeightEncoding } from "./weight-encoding.ts";

export interface ColumnsTile {
  /** Threads of a workgroup, along N. */
  readonly lanes: number;
  readonly tileRows: number;
  readonly tileColumns: number;
}

function range(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index);
}

/** `vec4f` expressions of the weights that code word `word` holds. */
function unpack(encoding: WeightEncoding, word: string): string[] {
  const bytes = (shifts: readonly number[]) =>
    `vec4f(vec4i(${shifts.map((shift) => `i32((${word} >> ${shift}u) & 15u)`).join(", ")}))`;
  switch (encoding.format) {
    case "q4":
      return [bytes([0, 8, 16, 24]), bytes([4, 12, 20, 28])];
    case "q8":
      return [`vec4f(vec4i(${[24, 16, 8, 0].map((s) => `(bitcast<i32>(${word} << ${s}u) >> 24u)`).join(", ")}))`];
    default:
      throw new RangeError(`${encoding.format} has no packed codes`);
  }
}

/** Statements that set `w{j}_{v}`, the vec4f `v` of output `j` in step `i` of group `g`. */
function loadWeights(encoding: WeightEncoding, j: number): string {
  const at = (word: string) => `codes[(${word}) * n + n${j}]`;
  switch (encoding.format) {
    case "f32": {
      const words = range(4).map((k) => `bitcast<f32>(${at(`g * 4u + ${k}u`)})`);
      return `let w${j}_0 = vec4f(${words.join(", ")});`;
    }
    case "f16":
      return `let w${j}_0 = vec4f(unpack2x16float(${at("g * 2u")}), unpack2x16float(${at("g * 2u + 1u")}));`;
    case "bf16":
      return `let c${j} = vec2u(${at("g * 2u")}, ${at("g * 2u + 1u")});
      let w${j}_0 = bitcast<vec4f>(vec4u(c${j}.x << 16u, c${j}.x & 0xffff0000u, c${j}.y << 16u, c${j}.y & 0xffff0000u));`;
    default: {
      const codes = unpack(encoding, `c${j}`);
      const scaled = (code: string) =>
        encoding.scales === "scale32" ? `${code} * s${j}` : `fma(${code}, vec4f(s${j}), vec4f(z${j}))`;
      return [
        `let c${j} = ${at(`g * ${codeWordsPerGroup(encoding)}u + i`)};`,
        ...codes.map((code, v) => `let w${j}_${v} = ${scaled(code)};`),
      ].join("\n      ");
    }
  }
}

function loadScales(encoding: WeightEncoding, j: number): string {
  const words = scaleWordsPerGroup(encoding);
  const at = (word: number) => `scales[(g * ${words}u + ${word}u) * n + n${j}]`;
  switch (encoding.scales) {
    case "none":
      return "";
    case "scale32":
      return `let s${j} = bitcast<f32>(${at(0)});`;
    case "pair16":
      return `let p${j} = unpack2x16float(${at(0)}); let s${j} = p${j}.x; let z${j} = p${j}.y;`;
    case "pair32":
      return `let s${j} = bitcast<f32>(${at(0)}); let z${j} = bitcast<f32>(${at(1)});`;
  }
}

/** vec4 of the input that vec4 `v` of step `i` meets, counted from the start of the row. */
function inputVector(encoding: WeightEncoding, v: number): string {
  return encoding.format === "q4" ? `g * 8u + i + ${v * 4}u` : `g * ${encoding.group / 4}u + i`;
}

/** Steps of one group: code words, or vec4s of float weights. */
export function columnsSteps(encoding: WeightEncoding): number {
  return encoding.scales === "none" ? 1 : codeWordsPerGroup(encoding);
}

/** Adds the products of one step to the sums, one after the other. */
function multiplyStep(encoding: WeightEncoding, tile: ColumnsTile): string[] {
  const vectors = range(encoding.format === "q4" ? 2 : 1);
  const addProduct = (m: number, j: number, v: number) => (total: string, c: string) =>
    `fma(w${j}_${v}.${c}, x${m}_${v}.${c}, ${total})`;
  const sum = (m: number, j: number) =>
    vectors.reduce((total, v) => ["x", "y", "z", "w"].reduce(addProduct(m, j, v), total), `a${m}_${j}`);
  return range(tile.tileRows).flatMap((m) => [
    ...vectors.map((v) => `let x${m}_${v} = input[row${m} + ${inputVector(encoding, v)}];`),
    ...range(tile.tileColumns).map((j) => `a${m}_${j} = ${sum(m, j)};`),
  ]);
}

/** The walk over group `g`. */
function groupBody(encoding: WeightEncoding, tile: ColumnsTile): string {
  const columns = range(tile.tileColumns);
  const step = [...columns.map((j) => loadWeights(encoding, j)), ...multiplyStep(encoding, tile)].join("\n      ");
  if (encoding.scales === "none") return `let i = 0u;\n      ${step}`;
  // The bound of the inner loop comes from outside, or the driver would unroll it and spill registers.
  return `${columns.map((j) => loadScales(encoding, j)).join("\n    ")}
    for (var i = 0u; i < parameters.steps; i++) {
      ${step}
    }`;
}

/** WGSL of the kernel; grid: x tiles of outputs, y tiles of rows. */
export function linearColumnsWgsl(encoding: WeightEncoding, tile: ColumnsTile): string {
  const { lanes, tileRows, tileColumns } = tile;
  const rows = range(tileRows);
  const columns = range(tileColumns);
  return `requires immediate_address_space;
${LINEAR_PARAMETERS}
@group(0) @binding(0) var<storage, read> input: array<vec4f>;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<f32>;
${LINEAR_STORE}
@compute @workgroup_size(${lanes})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let n = parameters.n;
  let groups = parameters.k / ${encoding.group}u;
  let firstRow = group.y * ${tileRows}u;
  let firstColumn = group.x * ${lanes * tileColumns}u + lane;
  ${rows.map((m) => `let row${m} = min(firstRow + ${m}u, parameters.rows - 1u) * (parameters.k / 4u);`).join("\n  ")}
  ${columns.map((j) => `let n${j} = min(firstColumn + ${j * lanes}u, n - 1u);`).join("\n  ")}
  ${rows.flatMap((m) => columns.map((j) => `var a${m}_${j} = 0.0;`)).join(" ")}
  for (var g = 0u; g < groups; g++) {
    ${groupBody(encoding, tile)}
  }
  ${rows
    .map(
      (m) => `if (firstRow + ${m}u < parameters.rows) {
    let at = (firstRow + ${m}u) * parameters.outputStride + parameters.outputOffset;
    ${columns.map((j) => `if (firstColumn + ${j * lanes}u < n) { store(at + n${j}, a${m}_${j}); }`).join("\n    ")}
  }`,
    )
    .join("\n  ")}
}
`;
}
