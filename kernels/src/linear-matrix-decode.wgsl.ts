/**
 * Linear layer for decode rows on subgroup matrices: f16 inputs, weights of any encoding in layout `rows`, f32 sums. Few
 * rows meet each weight, so the weights' bytes are what it costs.
 *
 * K is split into two halves whatever the number of rows: subgroups of the first and of the second half work side by side
 * in one workgroup, and a sum is first + second. So a row's bits depend on that row, N and K alone, not on the tile, and
 * small layers have twice the workers. In a step each half advances by `depth` columns: the threads fetch 16 bytes of
 * weights at a time, stage them as f16 in workgroup memory (lines padded by one vec4, so that eight lines start in
 * different banks), and fetch what comes `ahead` steps later while the subgroups multiply.
 *
 * Rows of a tile that lie behind the last one hold anything: what they meet are sums that nobody reads.
 */
import { PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import { type MatrixWeightUnit, matrixWeightUnit } from "./linear-matrix-weights.wgsl.ts";
import { LINEAR_PARAMETERS } from "./linear-parameters.wgsl.ts";
import { MATRIX_SIZE, MATRIX_THREADS, type MatrixDialect } from "./subgroup-matrix.ts";
import type { WeightEncoding } from "./weight-encoding.ts";

/** Shape of a workgroup; any gives the same bits. */
export interface MatrixDecodeTile {
  /** Subgroups along rows and outputs, for each half of K. */
  readonly subgroupsM: number;
  readonly subgroupsN: number;
  /** 16 × 16 sums that each subgroup holds in registers. */
  readonly tilesM: number;
  readonly tilesN: number;
  /** Columns of a step of each half: 32, 64 or 128. */
  readonly depth: 32 | 64 | 128;
  /** Steps that are in flight. */
  readonly ahead: number;
}

export interface MatrixDecodeOptions {
  readonly encoding: WeightEncoding;
  readonly tile: MatrixDecodeTile;
  readonly epilogue: "none" | "silu-mul";
  /** output += result, instead of output = result. */
  readonly accumulate: boolean;
  /** N and K are written into the text: constant bounds and strides are worth much here. */
  readonly outputs: number;
  readonly columns: number;
  readonly dialect: MatrixDialect;
  /** Unpacks codes with f16 arithmetic. */
  readonly shaderF16: boolean;
  /** Products written out between two loop turns; default all of a step. Software drivers compile one. */
  readonly unrolled?: number;
}

/** Parts of K with sums of their own. */
const HALVES = 2;

function range(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index);
}

/** Rows of a workgroup. */
export function decodeTileRows(tile: MatrixDecodeTile): number {
  return tile.subgroupsM * tile.tilesM * MATRIX_SIZE;
}

/** Weight rows of a workgroup; with `silu-mul` half of them are gates. */
export function decodeTileOutputs(tile: MatrixDecodeTile): number {
  return tile.subgroupsN * tile.tilesN * MATRIX_SIZE;
}

/** Columns of the first half: whole groups of 32. */
function halfColumns(columns: number): number {
  return Math.ceil(columns / 64) * 32;
}

/** Whether every step of both halves is whole. */
function wholeSteps({ tile, columns }: MatrixDecodeOptions): boolean {
  const half = halfColumns(columns);
  return half * HALVES === columns && half % tile.depth === 0;
}

function subgroups(tile: MatrixDecodeTile): number {
  return tile.subgroupsM * tile.subgroupsN * HALVES;
}

function threadsOf(tile: MatrixDecodeTile): number {
  return subgroups(tile) * MATRIX_THREADS;
}

/** vec4s of a staged line: the columns of both halves, and one more. */
function lineVectors(tile: MatrixDecodeTile): number {
  return (HALVES * tile.depth) / 8 + 1;
}

function inputVectors(tile: MatrixDecodeTile): number {
  return decodeTileRows(tile) * lineVectors(tile);
}

/** One operand's way from storage to workgroup memory, by `set`s of registers. */
interface Staging {
  readonly setup: string;
  /** Fetches the step that starts at column `column` of its half. */
  fetch(set: number, column: string): string;
  store(set: number, column: string): string;
}

/** How the pieces of `unit` columns of `lines` lines are shared out: a thread keeps its piece and strides over lines. */
function assignment({ tile, columns }: MatrixDecodeOptions, lines: number, unit: number) {
  const pieces = tile.depth / unit;
  const all = pieces * HALVES;
  const threads = threadsOf(tile);
  if (threads % all !== 0) throw new RangeError(`${threads} threads for ${all} pieces of a line`);
  const stride = threads / all;
  const half = `(thread % ${all}u / ${pieces}u)`;
  const piece = `thread % ${pieces}u`;
  return {
    units: range(Math.ceil(lines / stride)),
    line: (i: number) => `(thread / ${all}u + ${i * stride}u)`,
    /** The i-th unit exists for every thread. */
    full: (i: number) => (i + 1) * stride <= lines,
    live: (i: number) => `thread / ${all}u + ${i * stride}u < ${lines}u`,
    /** Unit in the row's first step, from the row's start. */
    unit: `${half} * ${halfColumns(columns) / unit}u + ${piece}`,
    /** vec4 in the staged line. */
    vector: `${half} * ${tile.depth / 8}u + (${piece}) * ${unit / 8}u`,
    /** Whether the piece lies in its half, in the step at `column`. */
    inside: (column: string) =>
      `(${column}) + (${piece}) * ${unit}u < select(${columns - halfColumns(columns)}u, ${halfColumns(columns)}u, ${half} == 0u)`,
  };
}

function stageInput(options: MatrixDecodeOptions): Staging {
  const { tile, columns } = options;
  const lines = decodeTileRows(tile);
  const { units, line, full, live, unit, vector, inside } = assignment(options, lines, 8);
  const whole = wholeSteps(options);
  const guard = (i: number, text: string) => (full(i) ? text : `if (${live(i)}) { ${text} }`);
  return {
    setup: `let inputLast = parameters.rows * ${columns / 8}u - 1u;
  ${units
    .map(
      (i) => `let inputAt${i} = (firstRow + ${line(i)}) * ${columns / 8}u + ${unit};
  ${range(tile.ahead)
    .map((set) => `var input${set}_${i} = vec4<u32>();`)
    .join(" ")}`,
    )
    .join("\n  ")}`,
    fetch: (set, column) =>
      units.map((i) => `input${set}_${i} = input[min(inputAt${i} + (${column}) / 8u, inputLast)];`).join("\n      "),
    store: (set, column) =>
      units
        .map((i) => {
          const value = whole ? `input${set}_${i}` : `select(vec4<u32>(), input${set}_${i}, ${inside(column)})`;
          return guard(i, `staged[${line(i)} * ${lineVectors(tile)}u + ${vector}] = ${value};`);
        })
        .join("\n      "),
  };
}

/** Text of the weight's row for line `line` of the tile. */
function weightRow({ tile, epilogue, outputs }: MatrixDecodeOptions, line: string): string {
  if (epilogue === "none") return `(firstOutput + ${line})`;
  const lines = tile.tilesN * MATRIX_SIZE;
  const half = lines / 2;
  return `(firstOutput + (${line} / ${lines}u) * ${half}u + ${line} % ${half}u + select(0u, ${outputs / 2}u, ${line} % ${lines}u >= ${half}u))`;
}

function stageWeights(options: MatrixDecodeOptions, weights: MatrixWeightUnit): Staging {
  const { tile, columns, outputs } = options;
  const lines = decodeTileOutputs(tile);
  const rowUnits = columns / weights.columns;
  const { units, line, full, live, unit, vector, inside } = assignment(options, lines, weights.columns);
  const names = (set: number, i: number) => weights.fields.map((field) => `${field.name}${set}_${i}`);
  const whole = wholeSteps(options);
  const cut = !whole || outputs % decodeTileOutputs(tile) !== 0 || !units.every(full);
  return {
    setup: units
      .map(
        (i) => `let weightAt${i} = ${weightRow(options, line(i))} * ${rowUnits}u + ${unit};
  ${range(tile.ahead)
    .flatMap((set) => weights.fields.map(({ type }, field) => `var ${names(set, i)[field]} = ${type}();`))
    .join(" ")}`,
      )
      .join("\n  "),
    fetch: (set, column) =>
      units
        .map((i) => {
          const at = `weightAt${i} + (${column}) / ${weights.columns}u`;
          const values = weights.fetchAt("at");
          const sets = names(set, i).map((name, field) => `${name} = ${values[field]};`);
          return `{ let at = ${cut ? `min(${at}, ${outputs * rowUnits - 1}u)` : at}; ${sets.join(" ")} }`;
        })
        .join("\n      "),
    store: (set, column) =>
      units
        .map((i) => {
          const to = `${inputVectors(tile)}u + ${line(i)} * ${lineVectors(tile)}u + ${vector}`;
          const stores = weights.halves(names(set, i)).map((halves, v) => {
            const value = whole ? halves : `select(vec4<u32>(), ${halves}, ${inside(column)})`;
            return `staged[${to} + ${v}u] = ${value};`;
          });
          return full(i) ? stores.join(" ") : `if (${live(i)}) { ${stores.join(" ")} }`;
        })
        .join("\n      "),
  };
}

/** Loads of 16 columns of the half, and their products. */
function product({ tile, dialect }: MatrixDecodeOptions, kk: string): string {
  const ms = range(tile.tilesM);
  const ns = range(tile.tilesN);
  const source = (base: string, line: number) => ({
    array: "staged",
    offset: `${base} + ${line * MATRIX_SIZE * lineVectors(tile)}u + ${kk} * 2u`,
    stride: `${lineVectors(tile)}u`,
  });
  return `{
        ${ms.map((m) => dialect.loadLeft(`a${m}`, { ...source("inputBase", m), major: "row" })).join("\n        ")}
        ${ns.map((n) => dialect.loadRight(`b${n}`, { ...source("weightBase", n), major: "column" })).join("\n        ")}
        ${ms.flatMap((m) => ns.map((n) => dialect.multiplyAccumulate(`c${m}_${n}`, `a${m}`, `b${n}`))).join("\n        ")}
      }`;
}

function products(options: MatrixDecodeOptions): string {
  const count = options.tile.depth / MATRIX_SIZE;
  const { unrolled = count } = options;
  if (unrolled >= count) {
    return range(count)
      .map((kk) => product(options, `${kk}u`))
      .join("\n      ");
  }
  const turns = range(unrolled).map((kk) => product(options, `(kk + ${kk}u)`));
  return `for (var kk = 0u; kk < ${count}u; kk += ${unrolled}u) {\n${turns.join("\n")}\n}`;
}

/** Walk over K without branches around fetches: behind the last step the last one is fetched again, for nobody. */
function walk(options: MatrixDecodeOptions, unit: MatrixWeightUnit): string {
  const { tile, columns } = options;
  const { ahead, depth } = tile;
  const input = stageInput(options);
  const weights = stageWeights(options, unit);
  const steps = Math.ceil(halfColumns(columns) / depth);
  const last = (steps - 1) * depth;
  const turns = Math.ceil(steps / ahead);
  const fetch = (set: number, column: string) => `${weights.fetch(set, column)}
      ${input.fetch(set, column)}`;
  const step = (set: number) => `workgroupBarrier();
      ${weights.store(set, `column + ${set * depth}u`)}
      ${input.store(set, `column + ${set * depth}u`)}
      workgroupBarrier();
      let next = min(column + ${(set + ahead) * depth}u, ${last}u);
      ${fetch(set, "next")}
      ${products(options)}`;
  // The last turn may have steps too many.
  const turn = (set: number) =>
    (turns - 1) * ahead + set < steps
      ? `{\n      ${step(set)}\n    }`
      : `if (column < ${(turns - 1) * ahead * depth}u) {\n      ${step(set)}\n    }`;
  return `${input.setup}
  ${weights.setup}
  ${range(ahead)
    .map((set) => fetch(set, `${Math.min(last, set * depth)}u`))
    .join("\n  ")}
  for (var column = 0u; column < ${turns * ahead * depth}u; column += ${ahead * depth}u) {
    ${range(ahead).map(turn).join("\n    ")}
  }`;
}

/** vec4s of the strips: 16 rows of every subgroup's sums. */
function stripVectors(tile: MatrixDecodeTile): number {
  return subgroups(tile) * MATRIX_SIZE * tile.tilesN * 4;
}

/** Sums of 16 rows of every subgroup go through workgroup memory; `write` handles one cell of them. */
function strips({ tile, dialect }: MatrixDecodeOptions, cells: number, write: (m: number) => string): string {
  const { tilesM, tilesN } = tile;
  return range(tilesM)
    .map((m) => {
      const stores = range(tilesN).map((n) =>
        dialect.storeVectors("staged", "vec4<u32>", `stripBase + ${n * 4}u`, `${tilesN * 4}u`, `c${m}_${n}`),
      );
      return `workgroupBarrier();
  ${stores.join(" ")}
  workgroupBarrier();
  for (var cell = thread; cell < ${cells}u; cell += ${threadsOf(tile)}u) {
    ${write(m)}
  }`;
    })
    .join("\n  ");
}

function storeSums(options: MatrixDecodeOptions): string {
  const { tile, accumulate } = options;
  const { tilesM, tilesN, subgroupsM, subgroupsN } = tile;
  const strip = MATRIX_SIZE * tilesN * 4;
  return strips(
    options,
    subgroupsM * subgroupsN * strip,
    (
      m,
    ) => `let row = firstRow + (cell / ${strip * subgroupsN}u) * ${tilesM * MATRIX_SIZE}u + ${m * MATRIX_SIZE}u + (cell % ${strip}u) / ${tilesN * 4}u;
    let column = firstOutput + ((cell / ${strip}u) % ${subgroupsN}u) * ${tilesN * MATRIX_SIZE}u + (cell % ${tilesN * 4}u) * 4u;
    if (row < parameters.rows && column < ${options.outputs}u) {
      let at = (row * parameters.outputStride + parameters.outputOffset + column) / 4u;
      output[at] = ${accumulate ? "output[at] + " : ""}sumAt(cell);
    }`,
  );
}

/** Each strip holds 16 rows of gates and, beside them, of the same features' ups. */
function storeGated(options: MatrixDecodeOptions): string {
  const { tilesM, tilesN, subgroupsM, subgroupsN } = options.tile;
  const strip = MATRIX_SIZE * tilesN;
  return strips(
    options,
    subgroupsM * subgroupsN * strip,
    (
      m,
    ) => `let row = firstRow + (cell / ${strip * subgroupsN}u) * ${tilesM * MATRIX_SIZE}u + ${m * MATRIX_SIZE}u + (cell % ${strip}u) / ${tilesN}u;
    let feature = firstOutput + ((cell / ${strip}u) % ${subgroupsN}u) * ${tilesN * 8}u + (cell % ${tilesN}u) * 8u;
    if (row < parameters.rows && feature < ${options.outputs / 2}u) {
      let at = (cell / ${tilesN}u) * ${tilesN * 4}u + (cell % ${tilesN}u) * 2u;
      output[row * ${options.outputs / 16}u + feature / 8u] = vec4<u32>(gatedHalves(at), gatedHalves(at + 1u));
    }`,
  );
}

function gatedFunctions(tile: MatrixDecodeTile, unit: MatrixWeightUnit): string {
  return `${unit.functions.includes(PACK_HALVES_WGSL) ? "" : PACK_HALVES_WGSL}
fn gatedHalves(at: u32) -> vec2<u32> {
  let gate = sumAt(at);
  // exp(-gate) stays finite: beyond 88 the sigmoid is 0 in f32 to the last bit that matters.
  let sigmoid = vec4f(1.0) / (vec4f(1.0) + exp(min(-gate, vec4f(88.0))));
  return packHalves(gate * sigmoid * sumAt(at + ${tile.tilesN * 2}u));
}
`;
}

/** WGSL of the kernel; grid: x tiles of outputs (of features, with `silu-mul`), y tiles of rows. */
export function linearMatrixDecodeWgsl(options: MatrixDecodeOptions): string {
  const { encoding, tile, epilogue, dialect, shaderF16 } = options;
  const { subgroupsM, subgroupsN, tilesM, tilesN, depth } = tile;
  const gated = epilogue === "silu-mul";
  const unit = matrixWeightUnit(encoding, shaderF16);
  const plane = subgroupsM * subgroupsN;
  const lines = lineVectors(tile);
  const staged = Math.max(inputVectors(tile) + decodeTileOutputs(tile) * lines, stripVectors(tile));
  const sums = range(tilesM).flatMap((m) => range(tilesN).map((n) => `c${m}_${n}`));
  const enableF16 = shaderF16 && !dialect.directives.includes("enable f16;") ? "enable f16;\n" : "";
  const text = `${enableF16}${dialect.directives}
requires immediate_address_space;
${LINEAR_PARAMETERS}
@group(0) @binding(0) var<storage, read> input: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<${gated ? "vec4<u32>" : "vec4f"}>;
${unit.functions}
var<workgroup> staged: array<vec4<u32>, ${staged}>;
// First half plus second half.
fn sumAt(at: u32) -> vec4f {
  return bitcast<vec4f>(staged[at]) + bitcast<vec4f>(staged[at + ${stripVectors(tile) / HALVES}u]);
}
${gated ? gatedFunctions(tile, unit) : ""}

@compute @workgroup_size(${threadsOf(tile)})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % ${MATRIX_THREADS}u;
  let subgroup = thread / ${MATRIX_THREADS}u;
  let half = subgroup / ${plane}u;
  let firstLineM = ((subgroup % ${plane}u) / ${subgroupsN}u) * ${tilesM * MATRIX_SIZE}u;
  let firstLineN = (subgroup % ${subgroupsN}u) * ${tilesN * MATRIX_SIZE}u;
  let firstOutput = group.x * ${decodeTileOutputs(tile) / (gated ? 2 : 1)}u;
  let firstRow = group.y * ${decodeTileRows(tile)}u;
  let inputBase = firstLineM * ${lines}u + half * ${depth / 8}u;
  let weightBase = ${inputVectors(tile)}u + firstLineN * ${lines}u + half * ${depth / 8}u;
  let stripBase = subgroup * ${MATRIX_SIZE * tilesN * 4}u;
  ${sums.map((sum) => `var ${sum} = ${dialect.zero};`).join(" ")}
  ${walk(options, unit)}
  ${gated ? storeGated(options) : storeSums(options)}
}
`;
  return `${text}${dialect.functions()}\n`;
}
