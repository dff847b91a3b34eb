/**
 * Linear layer for decode rows on subgroup matrices: f16 inputs, weights of any encoding in layout `rows`, f32 sums. Few
 * rows meet each weight, so the weights' bytes are what it costs.
 *
 * A workgroup owns a tile of rows × outputs. It takes K in steps of `slices · depth` columns: all threads fetch 16 bytes
 * of weights at a time, `ahead` steps before they are used, and stage them as f16 in workgroup memory (lines padded by one
 * vec4, so that eight lines start in different banks). Of each step, slice s (a set of subgroups) multiplies its `depth`
 * columns; at the end the slices' sums are added in order.
 *
 * A sum sees only its own row and weights, and in an order that `slices` and `depth` fix, whatever the rest of the tile.
 */
import { PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import { type MatrixWeightUnit, matrixWeightUnit } from "./linear-matrix-weights.wgsl.ts";
import { LINEAR_PARAMETERS } from "./linear-parameters.wgsl.ts";
import { MATRIX_SIZE, MATRIX_THREADS, type MatrixDialect } from "./subgroup-matrix.ts";
import type { WeightEncoding } from "./weight-encoding.ts";

/** Shape of a workgroup. Equal `slices` and `depth` give equal bits. */
export interface MatrixDecodeTile {
  readonly subgroupsM: number;
  readonly subgroupsN: number;
  /** 16 × 16 sums that each subgroup holds in registers. */
  readonly tilesM: number;
  readonly tilesN: number;
  /** Parts of each step along K, each with subgroups of its own. */
  readonly slices: number;
  /** Columns of K of one slice in a step: a multiple of 16; `slices · depth` is a multiple of 32. */
  readonly depth: number;
  /** Steps that are in flight. */
  readonly ahead: number;
  /** All of them fetch; the first `subgroupsM · subgroupsN · slices · 32` multiply. */
  readonly threads: number;
}

export interface MatrixDecodeOptions {
  readonly encoding: WeightEncoding;
  readonly tile: MatrixDecodeTile;
  readonly epilogue: "none" | "silu-mul";
  readonly dialect: MatrixDialect;
  /** Unpacks codes with f16 arithmetic. */
  readonly shaderF16: boolean;
  /** N and K are written into the text: constant bounds and strides are worth much here. */
  readonly outputs: number;
  readonly columns: number;
  /** 2: the next step is stored beside the one that is multiplied, with one barrier a step instead of two. */
  readonly buffers?: 1 | 2;
  readonly directInput?: boolean;
  readonly independent?: boolean;
  /** Products written out between two loop turns; default all of a step. Software drivers compile one. */
  readonly unrolled?: number;
}

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

function stepColumns(tile: MatrixDecodeTile): number {
  return tile.slices * tile.depth;
}

/** vec4s of a staged line. */
function lineVectors(tile: MatrixDecodeTile): number {
  return stepColumns(tile) / 8 + 1;
}

function inputVectors(tile: MatrixDecodeTile): number {
  return (tile as { direct?: boolean }).direct ? 0 : decodeTileRows(tile) * lineVectors(tile);
}

function subgroups(tile: MatrixDecodeTile): number {
  return tile.subgroupsM * tile.subgroupsN * tile.slices;
}

/** One operand's way from storage to workgroup memory, by `set`s of registers. */
interface Staging {
  readonly setup: string;
  /** Fetches the step that starts at column `column`. */
  fetch(set: number, column: string): string;
  /** Writes them to the buffer that starts at `buffer`. */
  store(set: number, column: string, buffer: string): string;
}

/** `text` for the i-th unit of a thread, where `count` units are shared out. */
function shared(count: number, threads: number, i: number, text: string): string {
  return (i + 1) * threads <= count ? text : `if (thread < ${count - i * threads}u) { ${text} }`;
}

/** Whether the last step is a whole one. */
function wholeSteps({ tile, columns }: MatrixDecodeOptions): boolean {
  return columns % stepColumns(tile) === 0;
}

/** Rows behind the last one repeat it, and columns behind the last one are fetched again, then replaced by zeros. */
function stageInput(options: MatrixDecodeOptions): Staging {
  const { tile, columns, independent = false } = options;
  const { ahead } = tile;
  const threads = independent ? 32 : tile.threads;
  const id = independent ? "lane" : "thread";
  const vectors = (independent ? tile.depth : stepColumns(tile)) / 8;
  const count = (independent ? tile.tilesM * 16 : decodeTileRows(tile)) * vectors;
  const units = range(options.directInput ? 0 : Math.ceil(count / threads));
  const line = (i: number) => `(${independent ? "lineM + " : ""}(${id} + ${i * threads}u) / ${vectors}u)`;
  const place = (i: number) =>
    `(${independent ? `slice * ${vectors}u + ` : ""}(${id} + ${i * threads}u) % ${vectors}u)`;
  const whole = wholeSteps(options);
  const at = (i: number, column: string) =>
    whole ? `inputAt${i} + (${column}) / 8u` : `inputAt${i} + min((${column}) / 8u + ${place(i)}, ${columns / 8 - 1}u)`;
  const value = (set: number, i: number, column: string) =>
    whole
      ? `input${set}_${i}`
      : `select(vec4<u32>(), input${set}_${i}, (${column}) / 8u + ${place(i)} < ${columns / 8}u)`;
  return {
    setup: units
      .map(
        (
          i,
        ) => `let inputAt${i} = min(firstRow + ${line(i)}, parameters.rows - 1u) * ${columns / 8}u${whole ? ` + ${place(i)}` : ""};
  ${range(ahead)
    .map((set) => `var input${set}_${i} = vec4<u32>();`)
    .join(" ")}`,
      )
      .join("\n  "),
    fetch: (set, column) => units.map((i) => `input${set}_${i} = input[${at(i, column)}];`).join("\n      "),
    store: (set, column, buffer) =>
      units
        .map((i) =>
          shared(
            count,
            threads,
            i,
            `staged[${buffer} + ${line(i)} * ${lineVectors(tile)}u + ${place(i)}] = ${value(set, i, column)};`,
          ),
        )
        .join("\n      "),
  };
}

/** Text of the weight's row for line `line` of the tile, clamped into the matrix. */
function weightRow({ tile, epilogue, outputs }: MatrixDecodeOptions, line: string): string {
  if (epilogue === "none") {
    const row = `firstOutput + ${line}`;
    return outputs % decodeTileOutputs(tile) === 0 ? row : `min(${row}, ${outputs - 1}u)`;
  }
  const lines = tile.tilesN * MATRIX_SIZE;
  const half = lines / 2;
  return `min(firstOutput + (${line} / ${lines}u) * ${half}u + ${line} % ${half}u, ${outputs / 2 - 1}u) + select(0u, ${outputs / 2}u, ${line} % ${lines}u >= ${half}u)`;
}

function stageWeights(options: MatrixDecodeOptions, unit: MatrixWeightUnit): Staging {
  const { tile, columns, independent = false } = options;
  const { ahead } = tile;
  const threads = independent ? 32 : tile.threads;
  const id = independent ? "lane" : "thread";
  const perLine = (independent ? tile.depth : stepColumns(tile)) / unit.columns;
  const count = (independent ? tile.tilesN * 16 : decodeTileOutputs(tile)) * perLine;
  const units = range(Math.ceil(count / threads));
  const line = (i: number) => `(${independent ? "lineN + " : ""}(${id} + ${i * threads}u) / ${perLine}u)`;
  const place = (i: number) =>
    `(${independent ? `slice * ${perLine}u + ` : ""}(${id} + ${i * threads}u) % ${perLine}u)`;
  const names = (set: number, i: number) => unit.fields.map((field) => `${field.name}${set}_${i}`);
  const whole = wholeSteps(options);
  const at = (i: number, column: string) => {
    const index = `(${column}) / ${unit.columns}u + ${place(i)}`;
    return whole ? `(${index})` : `min(${index}, ${columns / unit.columns - 1}u)`;
  };
  const lastLine = `${decodeTileOutputs(tile) - 1}u`;
  return {
    setup: units
      .map(
        (
          i,
        ) => `let weightRow${i} = ${weightRow(options, (i + 1) * threads <= count ? line(i) : `min(${line(i)}, ${lastLine})`)};
  ${range(ahead)
    .flatMap((set) => unit.fields.map(({ type }, field) => `var ${names(set, i)[field]} = ${type}();`))
    .join(" ")}`,
      )
      .join("\n  "),
    fetch: (set, column) =>
      units
        .flatMap((i) => {
          const values = unit.fetch(`weightRow${i}`, at(i, column), `${columns}u`);
          return unit.fields.map((_, field) => `${names(set, i)[field]} = ${values[field]};`);
        })
        .join("\n      "),
    store: (set, column, buffer) =>
      units
        .map((i) => {
          const to = `${buffer} + ${inputVectors(tile)}u + ${line(i)} * ${lineVectors(tile)}u + ${place(i)} * ${unit.columns / 8}u`;
          const inside = `(${column}) / ${unit.columns}u + ${place(i)} < ${columns / unit.columns}u`;
          const stores = unit
            .halves(names(set, i))
            .map(
              (halves, v) => `staged[${to} + ${v}u] = ${whole ? halves : `select(vec4<u32>(), ${halves}, ${inside})`};`,
            );
          return shared(count, threads, i, stores.join(" "));
        })
        .join("\n      "),
  };
}

/** Text that only the multiplying subgroups run. */
function multiplying(tile: MatrixDecodeTile, text: string): string {
  return subgroups(tile) * MATRIX_THREADS === tile.threads ? text : `if (subgroup < ${subgroups(tile)}u) { ${text} }`;
}

/** Loads of one 16-deep product of the slice, and its products. */
function product(
  { tile, dialect, directInput = false, columns }: MatrixDecodeOptions,
  kk: string,
  buffer: string,
  column: string,
): string {
  const ms = range(tile.tilesM);
  const ns = range(tile.tilesN);
  const source = (base: string, tile16: number) => ({
    array: "staged",
    offset: `${base} + ${buffer} + ${tile16 * MATRIX_SIZE * lineVectors(tile)}u + ${kk} * 2u`,
    stride: `${lineVectors(tile)}u`,
  });
  return `{
        ${ms.map((m) => dialect.loadLeft(`a${m}`, directInput ? { array: "input", offset: `directBase + ${(m * MATRIX_SIZE * columns) / 8}u + (${column}) / 8u + ${kk} * 2u`, stride: `${columns / 8}u`, major: "row" } : { ...source("inputBase", m), major: "row" })).join("\n        ")}
        ${ns.map((n) => dialect.loadRight(`b${n}`, { ...source("weightBase", n), major: "column" })).join("\n        ")}
        ${ms.flatMap((m) => ns.map((n) => dialect.multiplyAccumulate(`c${m}_${n}`, `a${m}`, `b${n}`))).join("\n        ")}
      }`;
}

function products(options: MatrixDecodeOptions, buffer: string, column: string): string {
  const count = options.tile.depth / MATRIX_SIZE;
  const { unrolled = count } = options;
  if (unrolled >= count)
    return multiplying(
      options.tile,
      range(count)
        .map((kk) => product(options, `${kk}u`, buffer, column))
        .join("\n      "),
    );
  const turns = range(unrolled).map((kk) => product(options, `(kk + ${kk}u)`, buffer, column));
  return multiplying(options.tile, `for (var kk = 0u; kk < ${count}u; kk += ${unrolled}u) {\n${turns.join("\n")}\n}`);
}

function bufferVectors(tile: MatrixDecodeTile): number {
  return inputVectors(tile) + decodeTileOutputs(tile) * lineVectors(tile);
}

/** Walk over K without branches around fetches: behind the last step the last one is fetched again, for nobody. */
function walk(options: MatrixDecodeOptions, unit: MatrixWeightUnit): string {
  const { tile, columns, buffers = 1 } = options;
  const { ahead } = tile;
  const input = stageInput(options);
  const weights = stageWeights(options, unit);
  const width = stepColumns(tile);
  const steps = Math.ceil(columns / width);
  const last = (steps - 1) * width;
  const fetch = (set: number, column: string) => `${weights.fetch(set, column)}
      ${input.fetch(set, column)}`;
  const store = (set: number, column: string, buffer: string) => `${weights.store(set, column, buffer)}
      ${input.store(set, column, buffer)}`;
  const turns = Math.ceil(steps / ahead);
  const start = `${input.setup}
  ${weights.setup}
  ${range(ahead)
    .map((set) => fetch(set, `${Math.min(last, set * width)}u`))
    .join("\n  ")}`;
  const next = (set: number) => `let next${set} = min(column + ${(set + ahead) * width}u, ${last}u);
      ${fetch(set, `next${set}`)}`;
  // The steps of the last turn that are too many.
  const guarded = (set: number, text: string) =>
    (turns - 1) * ahead + set < steps
      ? `{\n      ${text}\n    }`
      : `if (column < ${(turns - 1) * ahead * width}u) {\n      ${text}\n    }`;
  if (buffers === 1) {
    const barrier =
      options.independent && tile.threads > 32 && options.dialect.directives !== "" ? "" : "workgroupBarrier();";
    const step = (set: number) => `${barrier}
      ${store(set, `column + ${set * width}u`, "0u")}
      ${barrier}
      ${next(set)}
      ${products(options, "0u", `column + ${set * width}u`)}`;
    return `${start}
  for (var column = 0u; column < ${turns * ahead * width}u; column += ${ahead * width}u) {
    ${range(ahead)
      .map((set) => guarded(set, step(set)))
      .join("\n    ")}
  }`;
  }
  const size = bufferVectors(tile);
  const step = (set: number) => {
    const other = (set + 1) % ahead;
    return `workgroupBarrier();
      ${next(set)}
      ${products(options, "buffer", `column + ${set * width}u`)}
      buffer = ${size}u - buffer;
      ${store(other, `column + ${(set + 1) * width}u`, "buffer")}`;
  };
  return `${start}
  var buffer = 0u;
  ${store(0, "0u", "0u")}
  for (var column = 0u; column < ${turns * ahead * width}u; column += ${ahead * width}u) {
    ${range(ahead)
      .map((set) => guarded(set, step(set)))
      .join("\n    ")}
  }`;
}

/** vec4s of the strips: 16 rows of every subgroup's sums. */
function stripVectors(tile: MatrixDecodeTile): number {
  return subgroups(tile) * MATRIX_SIZE * tile.tilesN * 4;
}

/** Sums of 16 rows of every subgroup go through workgroup memory; `write` handles one cell of them. */
function strips({ tile, dialect }: MatrixDecodeOptions, cells: number, write: (m: number) => string): string {
  const { tilesM, tilesN, threads } = tile;
  return range(tilesM)
    .map((m) => {
      const stores = range(tilesN).map((n) =>
        dialect.storeVectors("staged", "vec4<u32>", `stripBase + ${n * 4}u`, `${tilesN * 4}u`, `c${m}_${n}`),
      );
      return `workgroupBarrier();
  ${multiplying(tile, stores.join(" "))}
  workgroupBarrier();
  for (var cell = thread; cell < ${cells}u; cell += ${threads}u) {
    ${write(m)}
  }`;
    })
    .join("\n  ");
}

/** `sumAt`: the slices' sums of a vec4 of the strips, added in order. */
function sumFunction(tile: MatrixDecodeTile): string {
  const slice = stripVectors(tile) / tile.slices;
  return `
fn sumAt(at: u32) -> vec4f {
  var sum = bitcast<vec4f>(staged[at]);
  ${range(tile.slices - 1)
    .map((s) => `sum += bitcast<vec4f>(staged[at + ${(s + 1) * slice}u]);`)
    .join("\n  ")}
  return sum;
}
`;
}

function storeSums(options: MatrixDecodeOptions): string {
  const { tilesM, tilesN, subgroupsM, subgroupsN } = options.tile;
  const strip = MATRIX_SIZE * tilesN * 4;
  return strips(
    options,
    subgroupsM * subgroupsN * strip,
    (
      m,
    ) => `let row = firstRow + (cell / ${strip * subgroupsN}u) * ${tilesM * MATRIX_SIZE}u + ${m * MATRIX_SIZE}u + (cell % ${strip}u) / ${tilesN * 4}u;
    let column = firstOutput + ((cell / ${strip}u) % ${subgroupsN}u) * ${tilesN * MATRIX_SIZE}u + (cell % ${tilesN * 4}u) * 4u;
    if (row < parameters.rows && column < n) {
      let at = (row * parameters.outputStride + parameters.outputOffset + column) / 4u;
      if (parameters.accumulate != 0u) { output[at] = output[at] + sumAt(cell); } else { output[at] = sumAt(cell); }
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
    if (row < parameters.rows && feature < n / 2u) {
      let at = (cell / ${tilesN}u) * ${tilesN * 4}u + (cell % ${tilesN}u) * 2u;
      output[row * (n / 16u) + feature / 8u] = vec4<u32>(gatedHalves(at), gatedHalves(at + 1u));
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
  const staged = Math.max(bufferVectors(tile) * (options.buffers ?? 1), stripVectors(tile));
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
${sumFunction(tile)}
${gated ? gatedFunctions(tile, unit) : ""}

@compute @workgroup_size(${tile.threads})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % ${MATRIX_THREADS}u;
  let subgroup = thread / ${MATRIX_THREADS}u;
  let slice = subgroup / ${plane}u;
  let n = ${options.outputs}u;
  let firstOutput = group.x * ${decodeTileOutputs(tile) / (gated ? 2 : 1)}u;
  let firstRow = group.y * ${decodeTileRows(tile)}u;
  let inputBase = ((subgroup % ${plane}u) / ${subgroupsN}u) * ${tilesM * MATRIX_SIZE * lines}u + slice * ${depth / 8}u;
  let weightBase = ${inputVectors(tile)}u + (subgroup % ${subgroupsN}u) * ${tilesN * MATRIX_SIZE * lines}u + slice * ${depth / 8}u;
  let lineM = ((subgroup % ${plane}u) / ${subgroupsN}u) * ${tilesM * MATRIX_SIZE}u;
  let lineN = (subgroup % ${subgroupsN}u) * ${tilesN * MATRIX_SIZE}u;
  let directBase = (firstRow + ((subgroup % ${plane}u) / ${subgroupsN}u) * ${tilesM * MATRIX_SIZE}u) * ${options.columns / 8}u + slice * ${depth / 8}u;
  let stripBase = subgroup * ${MATRIX_SIZE * tilesN * 4}u;
  ${sums.map((sum) => `var ${sum} = ${dialect.zero};`).join(" ")}
  ${walk(options, unit)}
  ${gated ? storeGated(options) : storeSums(options)}
}
`;
  return `${text}${dialect.functions()}\n`;
}
