/**
 * Linear layer for many rows on subgroup matrices: f16 inputs, weights of any encoding in layout `rows`, f32 sums.
 *
 * A workgroup owns a tile of rows × outputs. Both operands of one step along K are staged as f16 in workgroup memory, in
 * lines padded by one vec4, so that eight lines start in different banks; the next step is on its way in registers while
 * this one is multiplied. What is known beforehand (N, K) is written into the text: with constant strides the driver
 * fetches from one address plus constants and keeps all sums in registers.
 *
 * K is walked in order by every tile shape, and a sum sees only its own row and its own weights, so no result depends on
 * the number of rows, nor on the tile. Tiles at the edge are moved back into the matrix rather than cut: what two tiles
 * compute gets the same bits from both.
 */
import { PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import { type MatrixWeightUnit, matrixWeightUnit } from "./linear-matrix-weights.wgsl.ts";
import { LINEAR_PARAMETERS } from "./linear-parameters.wgsl.ts";
import { type MatrixTile, tileOutputs, tileRows, tileThreads } from "./matrix-tile.ts";
import { MATRIX_SIZE, MATRIX_THREADS, type MatrixDialect } from "./subgroup-matrix.ts";
import type { WeightEncoding } from "./weight-encoding.ts";

export interface MatrixPrefillOptions {
  readonly encoding: WeightEncoding;
  readonly tile: MatrixTile;
  /**
   * 2: half of the subgroups walk the second half of K, and a sum is first + second: the sums of decode's kernels, for
   * many rows. The second half starts at `ceil(K / 64) * 32`.
   */
  readonly slices: 1 | 2;
  /** Columns of K in a step of a slice; K is a multiple. */
  readonly depth: 32 | 64;
  readonly epilogue: "none" | "silu-mul";
  /** output += result, instead of output = result. */
  readonly accumulate: boolean;
  /** Every dispatch has at least a tile of rows; else rows are clamped, which costs. */
  readonly wholeRows: boolean;
  /** N is at least a tile of outputs. */
  readonly wholeOutputs: boolean;
  /** N and K in the text; without it they are read from the parameters, and shapes share one text. */
  readonly shape?: { readonly outputs: number; readonly columns: number };
  readonly dialect: MatrixDialect;
  /** Unpacks codes with f16 arithmetic. */
  readonly shaderF16: boolean;
}

function range(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index);
}

/** Whether the second half may be 32 columns shorter: then it multiplies zeros at its end. */
function raggedSlices({ slices, shape }: MatrixPrefillOptions): boolean {
  return slices === 2 && (shape === undefined || shape.columns % 64 !== 0);
}

/** vec4s of a staged line. */
function lineVectors({ depth }: MatrixPrefillOptions): number {
  return depth / 8 + 1;
}

/** One operand's way from storage to workgroup memory. */
interface Staging {
  /** Where the thread begins. */
  readonly setup: string;
  /** `var`s of the registers that hold what was fetched. */
  readonly registers: string;
  /** Fetches the step whose first column is named `column`. */
  fetch(column: string): string;
  /** Writes the registers to workgroup memory. */
  readonly store: string;
}

/** The i-th of a thread's units, where `count` units are shared by all threads. */
function guarded(count: number, threads: number, i: number, text: string): string {
  return (i + 1) * threads <= count ? text : `if (member < ${count - i * threads}u) { ${text} }`;
}

/**
 * Which line and which piece of it a thread stages. Eight neighbours fetch whole cache lines, and what they store must
 * fall into different banks: so two lines of four pieces are four lines apart (lines are an odd number of vec4s).
 */
function assignment(tile: MatrixTile, pieces: number) {
  return {
    /** Lines that all threads stage at a time. */
    lines: tileThreads(tile) / pieces,
    line: pieces === 4 ? "(subgroup * 8u + ((lane >> 2u) & 1u) * 4u + (lane >> 3u))" : `(member / ${pieces}u)`,
    piece: `(member % ${pieces}u)`,
  };
}

/** Zeros behind K. */
function inside(options: MatrixPrefillOptions, value: string): string {
  return raggedSlices(options) ? `select(vec4<u32>(), ${value}, column < k)` : value;
}

function stageInput(options: MatrixPrefillOptions): Staging {
  const { tile, depth, wholeRows } = options;
  const threads = tileThreads(tile);
  const count = tileRows(tile) * (depth / 8);
  const units = range(Math.ceil(count / threads));
  const { lines, line, piece } = assignment(tile, depth / 8);
  const at = (i: number, column: string) => `inputAt + ${column} / 8u + ${i * lines}u * (k / 8u)`;
  return {
    setup: `let inputLast = parameters.rows * (k / 8u) - 1u;
  let inputAt = (firstRow + ${line}) * (k / 8u) + ${piece};
  let inputTo = stagedBase + ${line} * ${lineVectors(options)}u + ${piece};`,
    registers: units.map((i) => `var input${i} = vec4<u32>();`).join(" "),
    fetch: (column) =>
      units
        .map((i) => `input${i} = input[${wholeRows ? at(i, column) : `min(${at(i, column)}, inputLast)`}];`)
        .join("\n    "),
    store: units
      .map((i) =>
        guarded(
          count,
          threads,
          i,
          `staged[inputTo + ${i * lines * lineVectors(options)}u] = ${inside(options, `input${i}`)};`,
        ),
      )
      .join("\n    "),
  };
}

/**
 * Rows of the weight that a tile's lines hold: text of a thread's first, and how far its i-th is ahead of that. With
 * `silu-mul` the lines of a subgroup are as many gates, then the same features' ups.
 */
function weightRows({ tile, epilogue }: MatrixPrefillOptions, lines: number, line: string) {
  if (epilogue === "none") return { first: `firstOutput + ${line}`, ahead: (i: number) => `${i * lines}u` };
  const half = tile.tilesN * (MATRIX_SIZE / 2);
  if (half % lines !== 0 && lines % (2 * half) !== 0) throw new RangeError(`${lines} lines of ${half} gates`);
  const row = (at: string) =>
    `(${at} / ${2 * half}u) * ${half}u + ${at} % ${half}u + select(0u, n / 2u, ${at} % ${2 * half}u >= ${half}u)`;
  return { first: `firstOutput + ${row(line)}`, ahead: (i: number) => `(${row(`${i * lines}u`)})` };
}

function stageWeights(options: MatrixPrefillOptions, unit: MatrixWeightUnit): Staging {
  const { tile, depth, wholeOutputs } = options;
  const threads = tileThreads(tile);
  const pieces = depth / unit.columns;
  const count = tileOutputs(tile) * pieces;
  const units = range(Math.ceil(count / threads));
  const { lines, line, piece } = assignment(tile, pieces);
  const { first, ahead } = weightRows(options, lines, line);
  const names = (i: number) => unit.fields.map(({ name }) => `${name}${i}`);
  const rowUnits = `(k / ${unit.columns}u)`;
  const fetch = (i: number, column: string) => {
    const at = `weightAt + ${column} / ${unit.columns}u + ${ahead(i)} * ${rowUnits}`;
    const values = unit.fetchAt("at");
    const sets = names(i).map((name, field) => `${name} = ${values[field]};`);
    return `{ let at = ${wholeOutputs ? at : `min(${at}, n * ${rowUnits} - 1u)`}; ${sets.join(" ")} }`;
  };
  const store = (i: number) => {
    const to = `weightTo + ${i * lines * lineVectors(options)}u`;
    return unit.halves(names(i)).map((halves, v) => `staged[${to} + ${v}u] = ${inside(options, halves)};`);
  };
  return {
    setup: `let weightAt = (${first}) * ${rowUnits} + ${piece};
  let weightTo = stagedBase + (${tileRows(tile)}u + ${line}) * ${lineVectors(options)}u + ${piece} * ${unit.columns / 8}u;`,
    registers: units.flatMap((i) => unit.fields.map(({ name, type }) => `var ${name}${i} = ${type}();`)).join(" "),
    fetch: (column) => units.map((i) => fetch(i, column)).join("\n    "),
    store: units.map((i) => guarded(count, threads, i, store(i).join(" "))).join("\n    "),
  };
}

/** Products of the 16 columns `slice` of the staged step. */
function multiply(options: MatrixPrefillOptions, slice: number): string {
  const { tile, dialect } = options;
  const vectors = lineVectors(options);
  const ms = range(tile.tilesM);
  const ns = range(tile.tilesN);
  const source = (base: string, line: number) => ({
    array: "staged",
    offset: `${base} + ${line * MATRIX_SIZE * vectors + slice * 2}u`,
    stride: `${vectors}u`,
  });
  return `{
    ${ms.map((m) => dialect.loadLeft(`a${m}`, { ...source("inputBase", m), major: "row" })).join("\n    ")}
    ${ns.map((n) => dialect.loadRight(`b${n}`, { ...source("weightBase", n), major: "column" })).join("\n    ")}
    ${ms.flatMap((m) => ns.map((n) => dialect.multiplyAccumulate(`c${m}_${n}`, `a${m}`, `b${n}`))).join("\n    ")}
    }`;
}

/** The walk over K. The last step fetches itself again rather than nothing: a branch would cost more. */
function walk(options: MatrixPrefillOptions, input: Staging, weights: Staging): string {
  const { depth, slices } = options;
  const parts = range(depth / MATRIX_SIZE).map((slice) => multiply(options, slice));
  const column = (step: string) => (slices === 1 ? step : `slice * steps + ${step}`);
  const fetched = (step: string) => (raggedSlices(options) ? `min(${column(step)}, k - ${depth}u)` : column(step));
  return `let steps = ${slices === 1 ? "k" : "(k + 63u) / 64u * 32u"};
  ${input.registers}
  ${weights.registers}
  {
    let first = ${fetched("0u")};
    ${input.fetch("first")}
    ${weights.fetch("first")}
  }
  for (var step = 0u; step < steps; step += ${depth}u) {
    let column = ${column("step")};
    workgroupBarrier();
    ${input.store}
    ${weights.store}
    workgroupBarrier();
    let nextStep = min(step + ${depth}u, steps - ${depth}u);
    let next = ${fetched("nextStep")};
    ${input.fetch("next")}
    ${weights.fetch("next")}
    ${parts.join("\n    ")}
  }`;
}

/** What happens with 16 rows of every subgroup's sums once they lie in workgroup memory. */
interface StripCells {
  /** Cells of a strip: 32 at a time, one each for the threads of a subgroup of the first slice. */
  readonly cells: number;
  /** Statements that fetch what cell `cell` of strip `m` needs, ahead of time. */
  fetch?(m: number, j: number, cell: string): string;
  /** Statements that write the cell. */
  write(m: number, j: number, cell: string): string;
}

/** Sums of 16 rows of every subgroup go through workgroup memory; what the next 16 need is fetched meanwhile. */
function strips(options: MatrixPrefillOptions, { cells, fetch, write }: StripCells): string {
  const { tile, dialect, slices } = options;
  const { tilesM, tilesN } = tile;
  const turns = range(cells / MATRIX_THREADS);
  const cell = (j: number) => `(lane + ${j * MATRIX_THREADS}u)`;
  const bySlice = (text: string) => (slices === 1 ? text : `if (slice == 0u) {\n  ${text}\n  }`);
  const fetches = (m: number) =>
    fetch === undefined || m >= tilesM ? "" : turns.map((j) => fetch(m, j, cell(j))).join("\n  ");
  const stores = (m: number) =>
    range(tilesN).map((n) =>
      dialect.storeVectors("staged", "vec4<u32>", `stripBase + ${n * 4}u`, `${tilesN * 4}u`, `c${m}_${n}`),
    );
  const strip = (m: number) => `workgroupBarrier();
  ${stores(m).join(" ")}
  ${fetches(m + 1)}
  workgroupBarrier();
  ${bySlice(turns.map((j) => write(m, j, cell(j))).join("\n  "))}`;
  return `${fetches(0)}\n  ${range(tilesM).map(strip).join("\n  ")}`;
}

/** vec4s of the strips of one slice. */
function stripVectors({ subgroupsM, subgroupsN, tilesN }: MatrixTile): number {
  return subgroupsM * subgroupsN * MATRIX_SIZE * tilesN * 4;
}

/** `sumAt`: a vec4 of the strips, slices added in order. */
function sumFunction({ tile, slices }: MatrixPrefillOptions): string {
  const second = slices === 1 ? "" : ` + bitcast<vec4f>(staged[at + ${stripVectors(tile)}u])`;
  return `fn sumAt(at: u32) -> vec4f { return bitcast<vec4f>(staged[at])${second}; }`;
}

function storeSums(options: MatrixPrefillOptions): string {
  const { tile, dialect, slices, accumulate, wholeRows, wholeOutputs } = options;
  const begin = `let stride = parameters.outputStride / 4u;
  let first = tileRow * stride + (parameters.outputOffset + tileOutput) / 4u;`;
  if (slices === 1 && !accumulate && wholeRows && wholeOutputs) {
    const stores = range(tile.tilesM).flatMap((m) =>
      range(tile.tilesN).map((n) =>
        dialect.storeVectors("output", "vec4f", `first + ${m * 16}u * stride + ${n * 4}u`, "stride", `c${m}_${n}`),
      ),
    );
    return `${begin}\n  ${stores.join("\n  ")}`;
  }
  const vectors = tile.tilesN * 4;
  const row = (m: number, cell: string) => `(${m * MATRIX_SIZE}u + ${cell} / ${vectors}u)`;
  const column = (cell: string) => `(${cell} % ${vectors}u)`;
  const at = (m: number, cell: string) => `first + ${row(m, cell)} * stride + ${column(cell)}`;
  // What the tile before this one has added is not added again.
  const own = (m: number, cell: string) =>
    `${inRange("tileRow", row(m, cell), "ownRow", "parameters.rows", wholeRows)} && ${inRange("tileOutput", `${column(cell)} * 4u`, "ownOutput", "n", wholeOutputs)}`;
  const before = (m: number, j: number) => `before${m}_${j}`;
  const added: Pick<StripCells, "fetch"> = {
    fetch: (m, j, cell) =>
      `var ${before(m, j)} = vec4f(); if (${own(m, cell)}) { ${before(m, j)} = output[${at(m, cell)}]; }`,
  };
  return `${begin}\n  ${strips(options, {
    cells: MATRIX_SIZE * vectors,
    ...(accumulate ? added : {}),
    write: (m, j, cell) =>
      `if (${own(m, cell)}) { output[${at(m, cell)}] = sumAt(stripBase + ${cell})${accumulate ? ` + ${before(m, j)}` : ""}; }`,
  })}`;
}

/** Condition that a line of the tile is the tile's own and inside the matrix. */
function inRange(tileFirst: string, line: string, own: string, end: string, whole: boolean): string {
  return whole ? `${tileFirst} + ${line} >= ${own}` : `${tileFirst} + ${line} < ${end}`;
}

/** Each strip holds 16 rows of gates and, beside them, of the same features' ups. */
function storeGated(options: MatrixPrefillOptions): string {
  const { tilesN, subgroupsN } = options.tile;
  const row = (m: number, cell: string) => `(tileRow + ${m * MATRIX_SIZE}u + ${cell} / ${tilesN}u)`;
  const feature = (cell: string) =>
    `(firstOutput + (subgroup % ${subgroupsN}u) * ${tilesN * 8}u + (${cell} % ${tilesN}u) * 8u)`;
  const at = (cell: string) => `stripBase + (${cell} / ${tilesN}u) * ${tilesN * 4}u + (${cell} % ${tilesN}u) * 2u`;
  return strips(options, {
    cells: MATRIX_SIZE * tilesN,
    write: (m, _, cell) => `if (${row(m, cell)} < parameters.rows && ${feature(cell)} < n / 2u) {
    output[${row(m, cell)} * (n / 16u) + ${feature(cell)} / 8u] = vec4<u32>(gatedHalves(${at(cell)}), gatedHalves(${at(cell)} + 1u));
  }`,
  });
}

function gatedFunction(tile: MatrixTile, unit: MatrixWeightUnit): string {
  return `${unit.functions.includes(PACK_HALVES_WGSL) ? "" : PACK_HALVES_WGSL}
fn gatedHalves(at: u32) -> vec2<u32> {
  let gate = sumAt(at);
  let up = sumAt(at + ${tile.tilesN * 2}u);
  // exp(-gate) stays finite: beyond 88 the sigmoid is 0 in f32 to the last bit that matters.
  let sigmoid = vec4f(1.0) / (vec4f(1.0) + exp(min(-gate, vec4f(88.0))));
  return packHalves(gate * sigmoid * up);
}
`;
}

/** vec4s that one slice stages. */
function sliceVectors(options: MatrixPrefillOptions): number {
  return (tileRows(options.tile) + tileOutputs(options.tile)) * lineVectors(options);
}

/** The tile's place: moved back to end with the matrix, where that is possible. */
function place(options: MatrixPrefillOptions): string {
  const { tile, epilogue, wholeRows, wholeOutputs } = options;
  const gated = epilogue === "silu-mul";
  const rows = tileRows(tile);
  const outputs = tileOutputs(tile) / (gated ? 2 : 1);
  const end = gated ? "n / 2u" : "n";
  return `let ownRow = group.x * ${rows}u;
  let ownOutput = group.y * ${outputs}u;
  let firstRow = ${wholeRows ? `min(ownRow, parameters.rows - ${rows}u)` : "ownRow"};
  let firstOutput = ${wholeOutputs ? `min(ownOutput, ${end} - ${outputs}u)` : "ownOutput"};`;
}

/** WGSL of the kernel; grid: x tiles of rows, y tiles of outputs (of features, with `silu-mul`). */
export function linearMatrixPrefillWgsl(options: MatrixPrefillOptions): string {
  const { encoding, tile, slices, epilogue, dialect, shaderF16, shape } = options;
  const { subgroupsN, tilesM, tilesN } = tile;
  const gated = epilogue === "silu-mul";
  const unit = matrixWeightUnit(encoding, shaderF16);
  const input = stageInput(options);
  const weights = stageWeights(options, unit);
  const vectors = lineVectors(options);
  const sums = range(tilesM).flatMap((m) => range(tilesN).map((n) => `var c${m}_${n} = ${dialect.zero};`));
  const enableF16 = shaderF16 && !dialect.directives.includes("enable f16;") ? "enable f16;\n" : "";
  const text = `${enableF16}${dialect.directives}
requires immediate_address_space;
${LINEAR_PARAMETERS}
@group(0) @binding(0) var<storage, read> input: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<${gated ? "vec4<u32>" : "vec4f"}>;
${unit.functions}
var<workgroup> staged: array<vec4<u32>, ${slices * Math.max(sliceVectors(options), stripVectors(tile))}>;
${sumFunction(options)}
${gated ? gatedFunction(tile, unit) : ""}

@compute @workgroup_size(${slices * tileThreads(tile)})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % ${MATRIX_THREADS}u;
  ${slices === 1 ? "let slice = 0u;\n  let member = thread;" : `let slice = thread / ${tileThreads(tile)}u;\n  let member = thread % ${tileThreads(tile)}u;`}
  let subgroup = member / ${MATRIX_THREADS}u;
  let n = ${shape === undefined ? "parameters.n" : `${shape.outputs}u`};
  let k = ${shape === undefined ? "parameters.k" : `${shape.columns}u`};
  ${place(options)}
  let lineM = (subgroup / ${subgroupsN}u) * ${tilesM * MATRIX_SIZE}u;
  let lineN = (subgroup % ${subgroupsN}u) * ${tilesN * MATRIX_SIZE}u;
  let stagedBase = slice * ${sliceVectors(options)}u;
  let inputBase = stagedBase + lineM * ${vectors}u;
  let weightBase = stagedBase + (${tileRows(tile)}u + lineN) * ${vectors}u;
  let tileRow = firstRow + lineM;
  let tileOutput = firstOutput + lineN;
  let stripBase = thread / ${MATRIX_THREADS}u * ${MATRIX_SIZE * tilesN * 4}u;
  ${input.setup}
  ${weights.setup}
  ${sums.join(" ")}
  ${walk(options, input, weights)}
  ${gated ? storeGated(options) : storeSums(options)}
}
`;
  return `${text}${dialect.functions()}\n`;
}
