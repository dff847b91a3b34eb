/**
 * Linear layer for many rows on subgroup matrices: f16 inputs, weights of any encoding in layout `rows`, f32 sums.
 *
 * A workgroup owns a tile of rows × outputs. Both operands of one step along K are staged as f16 in workgroup memory
 * (lines padded by one vec4, so that eight lines start in different banks), twice, with one barrier a step: the next step
 * is written while this one is multiplied, and the one after it is on its way in registers.
 *
 * K is walked in order by every tile shape, and a sum sees only its own row and its own weights, so no result depends on
 * the number of rows, nor on the tile.
 */

import { PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import { type MatrixWeightUnit, matrixWeightUnit } from "./linear-matrix-weights.wgsl.ts";
import { LINEAR_PARAMETERS } from "./linear-parameters.wgsl.ts";
import { MATRIX_SIZE, MATRIX_THREADS, type MatrixDialect } from "./subgroup-matrix.ts";
import type { WeightEncoding } from "./weight-encoding.ts";

/** Shape of a workgroup's tile: subgroups, and 16 × 16 sums that each of them holds in registers. */
export interface MatrixTile {
  readonly subgroupsM: number;
  readonly subgroupsN: number;
  readonly tilesM: number;
  readonly tilesN: number;
  /** Columns of K in a step: 32 or 64; K is a multiple. */
  readonly depth: 16 | 32 | 64;
  readonly buffers?: 1 | 2;
  readonly fragments?: boolean;
  readonly late?: boolean;
  readonly band?: number;
  readonly fixed?: { k: number };
  readonly pad?: number;
  readonly map?: "linear";
  readonly lazy?: boolean;
  readonly unroll2?: boolean;
  readonly noClamp?: boolean;
}

export interface MatrixPrefillOptions {
  readonly encoding: WeightEncoding;
  readonly tile: MatrixTile;
  readonly epilogue: "none" | "silu-mul";
  readonly dialect: MatrixDialect;
  /** Unpacks codes with f16 arithmetic. */
  readonly shaderF16: boolean;
}

function range(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index);
}

export function tileRows(tile: MatrixTile): number {
  return tile.subgroupsM * tile.tilesM * MATRIX_SIZE;
}

/** Weight rows of a tile; with `silu-mul` half of them are gates. */
export function tileOutputs(tile: MatrixTile): number {
  return tile.subgroupsN * tile.tilesN * MATRIX_SIZE;
}

function tileThreads(tile: MatrixTile): number {
  return tile.subgroupsM * tile.subgroupsN * MATRIX_THREADS;
}

/** One operand's way from storage to workgroup memory: registers that every thread fills, and the stores. */
interface Staging {
  readonly setup: string;
  /** `var` declarations with the first step. */
  readonly declare: string;
  /** Fetches the step whose first column is `column`. */
  fetch(column: string): string;
  /** Writes the registers to the buffer that starts at `at`. */
  store(at: string): string;
}

/** @param count units of a step. @param body text for the i-th unit of a thread. */
function guarded(count: number, threads: number, i: number, text: string): string {
  return (i + 1) * threads <= count ? text : `if (thread < ${count - i * threads}u) { ${text} }`;
}

/**
 * Which line and which piece of it a thread stages. Eight neighbours fetch whole cache lines, and what they store must
 * fall into different banks: two lines of four pieces are four lines apart (lines are an odd number of vec4s).
 */
function assignment(tile: MatrixTile, pieces: number) {
  const paired = pieces === 4 && tile.map !== "linear";
  return {
    lines: tileThreads(tile) / pieces,
    line: paired ? "(subgroup * 8u + ((lane >> 2u) & 1u) * 4u + (lane >> 3u))" : `(thread / ${pieces}u)`,
    piece: `(thread % ${pieces}u)`,
  };
}

function stageInput(tile: MatrixTile, lineVectors: number): Staging {
  const threads = tileThreads(tile);
  const vectors = tile.depth / 8;
  const count = tileRows(tile) * vectors;
  const units = range(Math.ceil(count / threads));
  const { lines, line, piece } = assignment(tile, vectors);
  const at = (i: number, column: string) => `inputAt + (${column}) / 8u + ${i * lines}u * (k / 8u)`;
  const fetch = (i: number, column: string) => tile.noClamp ? `input[${at(i, column)}]` : `input[min(${at(i, column)}, inputLast)]`;
  return {
    setup: `let inputLast = parameters.rows * (k / 8u) - 1u;
  let inputAt = (firstRow + ${line}) * (k / 8u) + ${piece};
  let inputTo = ${line} * ${lineVectors}u + ${piece};`,
    declare: units.map((i) => `var input${i} = ${fetch(i, "0u")};`).join("\n  "),
    fetch: (column) => units.map((i) => `input${i} = ${fetch(i, column)};`).join("\n    "),
    store: (to) =>
      units
        .map((i) => guarded(count, threads, i, `staged[${to} + inputTo + ${i * lines * lineVectors}u] = input${i};`))
        .join("\n    "),
  };
}

/** Texts of the weight's row that a tile's line holds: of a thread's first line, and what its i-th is ahead of that. */
function weightLines(tile: MatrixTile, epilogue: "none" | "silu-mul", lines: number, line: string) {
  if (epilogue === "none") return { first: `firstOutput + ${line}`, ahead: (i: number) => `${i * lines}u` };
  const half = tile.tilesN * 8;
  const upper = (text: string) => `select(0u, n / 2u, ${text} % ${2 * half}u >= ${half}u)`;
  const row = (text: string) => `(${text} / ${2 * half}u) * ${half}u + ${text} % ${half}u + ${upper(text)}`;
  if (half % lines !== 0 && lines % (2 * half) !== 0) throw new RangeError(`${lines} lines of ${half} gates`);
  return { first: `firstOutput + ${row(line)}`, ahead: (i: number) => `(${row(`${i * lines}u`)})` };
}

function stageWeights(
  tile: MatrixTile,
  epilogue: "none" | "silu-mul",
  unit: MatrixWeightUnit,
  lineVectors: number,
): Staging {
  const threads = tileThreads(tile);
  const perLine = tile.depth / unit.columns;
  const count = tileOutputs(tile) * perLine;
  const units = range(Math.ceil(count / threads));
  const { lines, line, piece } = assignment(tile, perLine);
  const { first, ahead } = weightLines(tile, epilogue, lines, line);
  const names = (i: number) => unit.fields.map((field) => `${field.name}${i}`);
  const rowUnits = `(k / ${unit.columns}u)`;
  const each = (column: string, write: (name: string, value: string) => string) =>
    units
      .map((i) => {
        const at = `weightAt + (${column}) / ${unit.columns}u + ${ahead(i)} * ${rowUnits}`;
        const values = unit.fetchAt("at");
        const lets = `{ let at = ${tile.noClamp ? at : `min(${at}, weightLast)`}; ${names(i).map((name, field) => write(name, values[field] as string)).join(" ")} }`;
        return lets;
      })
      .join("\n    ");
  return {
    setup: `let weightLast = n * ${rowUnits} - 1u;
  let weightAt = (${first}) * ${rowUnits} + ${piece};
  let weightTo = ${line} * ${lineVectors}u + ${piece} * ${unit.columns / 8}u;`,
    declare: `${units.flatMap((i) => unit.fields.map((field, f) => `var ${names(i)[f]} = ${field.type}();`)).join(" ")}
  ${each("0u", (name, value) => `${name} = ${value};`)}`,
    fetch: (column) => each(column, (name, value) => `${name} = ${value};`),
    store: (to) =>
      units
        .map((i) => {
          const base = `${to} + weightTo + ${i * lines * lineVectors}u`;
          const stores = unit.halves(names(i)).map((halves, v) => `staged[${base} + ${v}u] = ${halves};`);
          return guarded(count, threads, i, stores.join(" "));
        })
        .join("\n    "),
  };
}

/** Loads of one 16-deep slice and its products. */
function slice(tile: MatrixTile, dialect: MatrixDialect, lineVectors: number) {
  const ms = range(tile.tilesM);
  const ns = range(tile.tilesN);
  const source = (array: string, base: string, buffer: string, line: number, kk: number) => ({
    array,
    offset: `${base} + ${buffer} + ${line * MATRIX_SIZE * lineVectors + kk * 2}u`,
    stride: `${lineVectors}u`,
  });
  return {
    load: (prefix: string, kk: number, buffer: string) => [
      ...ms.map((m) =>
        dialect.loadLeft(`${prefix}a${m}`, { ...source("staged", "inputBase", buffer, m, kk), major: "row" }),
      ),
      ...ns.map((n) =>
        dialect.loadRight(`${prefix}b${n}`, {
          ...source("staged", "weightBase", buffer, n, kk),
          major: "column",
        }),
      ),
    ],
    lazy: (kk: number, buffer: string) => [
      ...ns.map((n) => dialect.loadRight(`b${n}`, { ...source("staged", "weightBase", buffer, n, kk), major: "column" })),
      ...ms.flatMap((m) => [
        dialect.loadLeft(`a${m}`, { ...source("staged", "inputBase", buffer, m, kk), major: "row" }),
        ...ns.map((n) => dialect.multiplyAccumulate(`c${m}_${n}`, `a${m}`, `b${n}`)),
      ]),
    ],
    multiply: (prefix: string) =>
      ms.flatMap((m) => ns.map((n) => dialect.multiplyAccumulate(`c${m}_${n}`, `${prefix}a${m}`, `${prefix}b${n}`))),
  };
}

/** Walk over K. */
function walk(tile: MatrixTile, input: Staging, weights: Staging, dialect: MatrixDialect, lineVectors: number): string {
  const { depth, buffers = 2 } = tile;
  const parts = slice(tile, dialect, lineVectors);
  const slices = range(depth / MATRIX_SIZE);
  const bufferVectors = (tileRows(tile) + tileOutputs(tile)) * lineVectors;
  const weightsAt = `${tileRows(tile) * lineVectors}u`;
  const compute = (buffer: string) =>
    slices
      .map((kk) => `{\n    ${(tile.lazy ? parts.lazy(kk, buffer) : [...parts.load("", kk, buffer), ...parts.multiply("")]).join("\n    ")}\n    }`)
      .join("\n    ");
  const store = (buffer: string) => `${input.store(buffer)}
    ${weights.store(`${buffer} + ${weightsAt}`)}`;
  const next = (ahead: number) => `let next = min(column + ${ahead * depth}u, k - ${depth}u);
    ${input.fetch("next")}
    ${weights.fetch("next")}`;
  if (buffers === 1) {
    return `${input.declare}
  ${weights.declare}
  for (var column = 0u; column < k; column += ${depth}u) {
    workgroupBarrier();
    ${store("0u")}
    workgroupBarrier();
    ${next(1)}
    ${compute("0u")}
  }`;
  }
  const first = `${input.declare}
  ${weights.declare}
  var buffer = 0u;
  ${store("0u")}
  {
    let second = min(${depth}u, k - ${depth}u);
    ${input.fetch("second")}
    ${weights.fetch("second")}
  }
  workgroupBarrier();`;
  const refill = `let other = ${bufferVectors}u - buffer;
    ${store("other")}
    ${next(2)}`;
  if (tile.fragments) {
    const last = slices.length - 1;
    const carried = (name: string) => [
      ...range(tile.tilesM).map((m) => `${name}a${m}`),
      ...range(tile.tilesN).map((n) => `${name}b${n}`),
    ];
    const from = carried("next_");
    return `${first}
  ${parts
    .load("f_", 0, "0u")
    .map((text) => text.replace("let ", "var "))
    .join("\n  ")}
  for (var column = 0u; column < k; column += ${depth}u) {
    ${refill}
    ${slices
      .map((kk) =>
        kk < last
          ? `${parts.load(`s${kk + 1}_`, kk + 1, "buffer").join("\n    ")}\n    ${parts.multiply(kk === 0 ? "f_" : `s${kk}_`).join("\n    ")}`
          : `workgroupBarrier();\n    buffer = other;\n    ${parts.load("next_", 0, "buffer").join("\n    ")}\n    ${parts.multiply(kk === 0 ? "f_" : `s${kk}_`).join("\n    ")}`,
      )
      .join("\n    ")}
    ${carried("f_")
      .map((name, i) => `${name} = ${from[i]};`)
      .join(" ")}
  }`;
  }
  if (tile.unroll2) {
    const half = (now: string, other: string, ahead: number) => `${store(other)}
    { let next = min(column + ${ahead * depth}u, k - ${depth}u);
    ${input.fetch("next")}
    ${weights.fetch("next")} }
    ${compute(now)}
    workgroupBarrier();`;
    return `${first}
  for (var column = 0u; column < k; column += ${2 * depth}u) {
    ${half("0u", `${bufferVectors}u`, 2)}
    ${half(`${bufferVectors}u`, "0u", 3)}
  }`;
  }
  return `${first}
  for (var column = 0u; column < k; column += ${depth}u) {
    ${tile.late ? `${compute("buffer")}\n    ${refill}` : `${refill}\n    ${compute("buffer")}`}
    workgroupBarrier();
    buffer = other;
  }`;
}

function stagedVectors(tile: MatrixTile): number {
  const { depth, buffers = 2, pad = 1 } = tile;
  const strips = tile.subgroupsM * tile.subgroupsN * MATRIX_SIZE * tile.tilesN * 4;
  return Math.max(buffers * (tileRows(tile) + tileOutputs(tile)) * (depth / 8 + pad), strips);
}

/** Where sums cannot be stored whole they go through workgroup memory, a strip of 16 rows a subgroup at a time. */
function stripText({ tile, dialect }: MatrixPrefillOptions, m: number, write: string): string {
  const stores = range(tile.tilesN).map((n) =>
    dialect.storeVectors("staged", "vec4<u32>", `stripBase + ${n * 4}u`, `${tile.tilesN * 4}u`, `c${m}_${n}`),
  );
  return `workgroupBarrier();
    ${stores.join(" ")}
    workgroupBarrier();
    ${write}`;
}

function storeSums(options: MatrixPrefillOptions): string {
  const { tile, dialect } = options;
  const ms = range(tile.tilesM);
  const vectors = tile.tilesN * 4;
  const whole = ms.flatMap((m) =>
    range(tile.tilesN).map((n) =>
      dialect.storeVectors("output", "vec4f", `at + ${m * MATRIX_SIZE}u * stride + ${n * 4}u`, "stride", `c${m}_${n}`),
    ),
  );
  const cells = (m: number) => `for (var cell = lane; cell < ${16 * vectors}u; cell += ${MATRIX_THREADS}u) {
      let row = tileRow + ${m * MATRIX_SIZE}u + cell / ${vectors}u;
      let column = tileOutput + (cell % ${vectors}u) * 4u;
      if (row < parameters.rows && column < n) {
        let at = row * stride + (parameters.outputOffset + column) / 4u;
        let sum = bitcast<vec4f>(staged[stripBase + cell]);
        if (parameters.accumulate != 0u) { output[at] = output[at] + sum; } else { output[at] = sum; }
      }
    }`;
  return `let stride = parameters.outputStride / 4u;
  if (parameters.accumulate == 0u && firstRow + ${tileRows(tile)}u <= parameters.rows && firstOutput + ${tileOutputs(tile)}u <= n) {
    let at = tileRow * stride + (parameters.outputOffset + tileOutput) / 4u;
    ${whole.join("\n    ")}
  } else {
    ${ms.map((m) => stripText(options, m, cells(m))).join("\n    ")}
  }`;
}

/** Each strip holds 16 rows of gates and, beside them, of the same features' ups. */
function storeGated(options: MatrixPrefillOptions): string {
  const { tile } = options;
  const vectors = tile.tilesN * 4;
  const pieces = tile.tilesN;
  const cells = (m: number) => `for (var cell = lane; cell < ${16 * pieces}u; cell += ${MATRIX_THREADS}u) {
      let row = tileRow + ${m * MATRIX_SIZE}u + cell / ${pieces}u;
      let feature = firstOutput + (subgroup % ${tile.subgroupsN}u) * ${tile.tilesN * 8}u + (cell % ${pieces}u) * 8u;
      if (row < parameters.rows && feature < n / 2u) {
        output[row * (n / 16u) + feature / 8u] = gated(stripBase + (cell / ${pieces}u) * ${vectors}u + (cell % ${pieces}u) * 2u);
      }
    }`;
  return range(tile.tilesM)
    .map((m) => stripText(options, m, cells(m)))
    .join("\n  ");
}

function gatedFunctions(tile: MatrixTile, unit: MatrixWeightUnit): string {
  return `${unit.functions.includes(PACK_HALVES_WGSL) ? "" : PACK_HALVES_WGSL}
fn gatedHalves(at: u32) -> vec2<u32> {
  let gate = bitcast<vec4f>(staged[at]);
  let up = bitcast<vec4f>(staged[at + ${tile.tilesN * 2}u]);
  // exp(-gate) stays finite: beyond 88 the sigmoid is 0 in f32 to the last bit that matters.
  let sigmoid = vec4f(1.0) / (vec4f(1.0) + exp(min(-gate, vec4f(88.0))));
  return packHalves(gate * sigmoid * up);
}
fn gated(at: u32) -> vec4<u32> { return vec4<u32>(gatedHalves(at), gatedHalves(at + 1u)); }
`;
}

/** WGSL of the kernel; grid: x tiles of rows, y tiles of outputs (of features, with `silu-mul`). */
export function linearMatrixPrefillWgsl(options: MatrixPrefillOptions): string {
  const { encoding, tile, epilogue, dialect, shaderF16 } = options;
  const { subgroupsN, tilesM, tilesN, depth, pad = 1 } = tile;
  const unit = matrixWeightUnit(encoding, shaderF16);
  const lineVectors = depth / 8 + pad;
  const input = stageInput(tile, lineVectors);
  const weights = stageWeights(tile, epilogue, unit, lineVectors);
  const width = tilesN * MATRIX_SIZE;
  const outputs = tileOutputs(tile) / (epilogue === "silu-mul" ? 2 : 1);
  const sums = range(tilesM).flatMap((m) => range(tilesN).map((n) => `c${m}_${n}`));
  const order = tile.band
    ? `let id = group.y * groups.x + group.x;
  let bandSize = ${tile.band}u * groups.y;
  let bandFirst = (id / bandSize) * ${tile.band}u;
  let bandRows = min(${tile.band}u, groups.x - bandFirst);
  let inBand = id % bandSize;
  let firstRow = (bandFirst + inBand % bandRows) * ${tileRows(tile)}u;
  let firstOutput = (inBand / bandRows) * ${outputs}u;`
    : `let firstRow = group.x * ${tileRows(tile)}u;
  let firstOutput = group.y * ${outputs}u;`;
  const enableF16 = shaderF16 && !dialect.directives.includes("enable f16;") ? "enable f16;\n" : "";
  const text = `${enableF16}${dialect.directives}
requires immediate_address_space;
${LINEAR_PARAMETERS}
@group(0) @binding(0) var<storage, read> input: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<${epilogue === "silu-mul" ? "vec4<u32>" : "vec4f"}>;
${unit.functions}
var<workgroup> staged: array<vec4<u32>, ${stagedVectors(tile)}>;
${epilogue === "silu-mul" ? gatedFunctions(tile, unit) : ""}

@compute @workgroup_size(${tileThreads(tile)})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % ${MATRIX_THREADS}u;
  let subgroup = thread / ${MATRIX_THREADS}u;
  let k = ${tile.fixed ? `${tile.fixed.k}u` : "parameters.k"};
  let n = parameters.n;
  ${order}
  let inputBase = (subgroup / ${subgroupsN}u) * ${tilesM * MATRIX_SIZE * lineVectors}u;
  let weightBase = ${tileRows(tile) * lineVectors}u + (subgroup % ${subgroupsN}u) * ${tilesN * MATRIX_SIZE * lineVectors}u;
  let tileRow = firstRow + (subgroup / ${subgroupsN}u) * ${tilesM * MATRIX_SIZE}u;
  let tileOutput = firstOutput + (subgroup % ${subgroupsN}u) * ${width}u;
  let stripBase = subgroup * ${MATRIX_SIZE * tilesN * 4}u;
  ${input.setup}
  ${weights.setup}
  ${sums.map((sum) => `var ${sum} = ${dialect.zero};`).join(" ")}
  ${walk(tile, input, weights, dialect, lineVectors)}
  ${epilogue === "silu-mul" ? storeGated(options) : storeSums(options)}
}
`;
  return `${text}${dialect.functions()}\n`;
}
