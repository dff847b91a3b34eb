/**
 * Linear layer for a few decode rows by f32 multiply-adds: f16 inputs, weights of any encoding in layout `rows`.
 *
 * A subgroup owns `outputs` rows of weights. Its lanes walk along them in units of 16 bytes, `loads` units of each row at a
 * time, so that enough bytes are on their way; inputs come from the cache and serve all rows of the subgroup.
 * The bits are not those of the matrix kernels, and depend on the subgroup's size: for `fast` numerics only.
 */
import { PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import { LINEAR_PARAMETERS } from "./linear-parameters.wgsl.ts";
import type { WeightEncoding } from "./weight-encoding.ts";

/** What a subgroup does, and how many of them make a workgroup. */
export interface VectorTile {
  /** Rows of weights of a subgroup; even with `silu-mul`, where half of them are gates. */
  readonly outputs: number;
  /** Units of each of these rows that are fetched together. */
  readonly loads: number;
  /** Subgroups of a workgroup; a multiple of four features with `silu-mul`. */
  readonly subgroups: number;
}

export interface VectorOptions {
  readonly encoding: WeightEncoding;
  readonly tile: VectorTile;
  /** Most input rows of a dispatch: few, since each takes registers. */
  readonly rows: number;
  /** N and K; K is a multiple of 32. */
  readonly outputs: number;
  readonly columns: number;
  readonly epilogue: "none" | "silu-mul";
  /** Lanes of a subgroup. */
  readonly lanes: number;
  /** Unpacks codes with f16 arithmetic. */
  readonly shaderF16: boolean;
}

function range(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index);
}

const COMPONENTS = ["x", "y", "z", "w"] as const;

/** Columns of 16 bytes of codes. */
const UNIT_COLUMNS = { f32: 4, f16: 8, bf16: 8, q8: 16, q4: 32 } as const;

/** Two weights of a unit (codes, where there are scales). */
interface WeightPair {
  /** vec2f expression. */
  readonly text: string;
  readonly columns: readonly [number, number];
}

function wordPairs(format: WeightEncoding["format"], word: string, i: number): readonly WeightPair[] {
  switch (format) {
    case "f32":
      return [];
    case "f16":
      return [{ text: `unpack2x16float(${word})`, columns: [2 * i, 2 * i + 1] }];
    case "bf16":
      return [{ text: `bitcast<vec2f>(vec2u(${word} << 16u, ${word} & 0xffff0000u))`, columns: [2 * i, 2 * i + 1] }];
    case "q8":
      return [0, 1].map((odd) => ({
        text: `signedBytes(${word}${odd === 0 ? "" : " >> 8u"})`,
        columns: [4 * i + odd, 4 * i + odd + 2],
      }));
    case "q4":
      return [0, 1].flatMap((odd) =>
        ["lowNibbles", "highNibbles"].map((name, half): WeightPair => {
          const first = 16 * half + 4 * i + odd;
          return { text: `${name}(${word}${odd === 0 ? "" : " >> 8u"})`, columns: [first, first + 2] };
        }),
      );
  }
}

function unitPairs({ format }: WeightEncoding, codes: string): readonly WeightPair[] {
  if (format !== "f32") return COMPONENTS.flatMap((c, i) => wordPairs(format, `${codes}.${c}`, i));
  return ["xy", "zw"].map((two, i) => ({ text: `bitcast<vec2f>(${codes}.${two})`, columns: [2 * i, 2 * i + 1] }));
}

/** Bytes 0 and 2 of a word. 0x6400 is 1024 as a half, 0x5400 is 64; 0x4b000000 is 2²³ as an f32: all exact. */
const UNPACK = {
  native: `
fn signedBytes(w: u32) -> vec2f { return vec2f(bitcast<vec2<f16>>((w & 0x00ff00ffu) ^ 0x64806480u) - vec2<f16>(1152.0h)); }
fn lowNibbles(w: u32) -> vec2f { return vec2f(bitcast<vec2<f16>>((w & 0x000f000fu) | 0x64006400u) - vec2<f16>(1024.0h)); }
fn highNibbles(w: u32) -> vec2f { return vec2f(bitcast<vec2<f16>>((w & 0x00f000f0u) | 0x54005400u) - vec2<f16>(64.0h)); }
`,
  plain: `
fn biased(w: u32) -> vec2f { return bitcast<vec2f>((vec2u(w, w >> 16u) & vec2u(0xffu)) | vec2u(0x4b000000u)); }
fn signedBytes(w: u32) -> vec2f { return biased(w ^ 0x00800080u) - vec2f(8388736.0); }
fn lowNibbles(w: u32) -> vec2f { return biased(w & 0x000f000fu) - vec2f(8388608.0); }
fn highNibbles(w: u32) -> vec2f { return lowNibbles(w >> 4u); }
`,
};

/** vec2f of scale and minimum of group `at`. */
function scaleText({ scales }: WeightEncoding, at: string): string {
  switch (scales) {
    case "none":
      return "vec2f(1.0, 0.0)";
    case "scale32":
      return `vec2f(bitcast<f32>(scales[${at}]), 0.0)`;
    case "pair16":
      return `unpack2x16float(scales[${at}])`;
    case "pair32":
      return `vec2f(bitcast<f32>(scales[(${at}) * 2u]), bitcast<f32>(scales[(${at}) * 2u + 1u]))`;
  }
}

/** Units of a row, and whether every lane always has one. */
function shares({ encoding, tile, columns, lanes }: VectorOptions) {
  const units = columns / UNIT_COLUMNS[encoding.format];
  return { units, whole: units % (lanes * tile.loads) === 0 };
}

/** Outputs (features, with `silu-mul`) of a workgroup. */
export function vectorTileOutputs(tile: VectorTile, epilogue: VectorOptions["epilogue"]): number {
  return (tile.subgroups * tile.outputs) / (epilogue === "silu-mul" ? 2 : 1);
}

/** Fetches the units of one turn: `c{o}_{l}` and scales `s{o}_{l}`; a lane behind the end takes the last unit. */
function fetchUnits(options: VectorOptions): string {
  const { encoding, tile, columns, lanes } = options;
  const { units, whole } = shares(options);
  const perGroup = encoding.group / UNIT_COLUMNS[encoding.format];
  const lines = range(tile.loads).map((l) => {
    const unit = `u + ${l * lanes}u`;
    return `let unit${l} = ${whole ? unit : `min(${unit}, ${units - 1}u)`};`;
  });
  for (const l of range(tile.loads)) {
    for (const o of range(tile.outputs)) lines.push(`let c${o}_${l} = codes[row${o} * ${units}u + unit${l}];`);
  }
  if (encoding.scales === "none") return lines.join("\n    ");
  for (const l of range(tile.loads)) {
    for (const o of range(tile.outputs)) {
      const group = perGroup >= 1 ? `unit${l} / ${perGroup}u` : `unit${l} * ${1 / perGroup}u`;
      lines.push(`let s${o}_${l} = ${scaleText(encoding, `(row${o} * ${columns / encoding.group}u + ${group})`)};`);
    }
  }
  return lines.join("\n    ");
}

/** Input m of unit l: `x{0 …}`, pairs of columns; zeros behind the end. */
function fetchInput(options: VectorOptions, m: number, l: number): string {
  const { encoding, columns, lanes } = options;
  const { units, whole } = shares(options);
  const unitColumns = UNIT_COLUMNS[encoding.format];
  const words = range(unitColumns / 2);
  const row = `min(${m}u, parameters.rows - 1u) * ${columns / 8}u`;
  const lines =
    unitColumns === 4
      ? [`let h = input[${row} + unit${l} / 2u];`, `let h0 = select(h.xy, h.zw, unit${l} % 2u == 1u);`]
      : range(unitColumns / 8).map((v) => `let h${v} = input[${row} + unit${l} * ${unitColumns / 8}u + ${v}u];`);
  for (const word of words) {
    const value = `unpack2x16float(h${word >> 2}.${COMPONENTS[word & 3]})`;
    const live = `u + ${l * lanes}u < ${units}u`;
    lines.push(`let x${word} = ${whole ? value : `select(vec2f(), ${value}, ${live})`};`);
  }
  if (encoding.scales.startsWith("pair")) {
    lines.push(`let total = dot(${words.map((word) => `x${word}`).join(" + ")}, vec2f(1.0));`);
  }
  return lines.join("\n      ");
}

/** Adds the products of units `l` of all rows to the sums. */
function multiplyUnits(options: VectorOptions, l: number): string {
  const { encoding, tile, rows } = options;
  const os = range(tile.outputs);
  const x = (column: number) => `x${column >> 1}.${column % 2 === 0 ? "x" : "y"}`;
  const product = (m: number, o: number) => {
    const chain = (start: string) =>
      unitPairs(encoding, "").reduce(
        (sum, { columns: [a, b] }, i) => `fma(w${o}_${i}, vec2f(${x(a)}, ${x(b)}), ${sum})`,
        start,
      );
    const sum = `sum${m}_${o}`;
    if (encoding.scales === "none") return `${sum} = ${chain(sum)};`;
    const minimum = encoding.scales === "scale32" ? "0.0" : "total";
    return `{ let d = ${chain("vec2f()")}; ${sum} = fma(s${o}_${l}, vec2f(d.x + d.y, ${minimum}), ${sum}); }`;
  };
  return `{
    ${os.flatMap((o) => unitPairs(encoding, `c${o}_${l}`).map(({ text }, i) => `let w${o}_${i} = ${text};`)).join("\n    ")}
    ${range(rows)
      .map(
        (m) => `{
      ${fetchInput(options, m, l)}
      ${os.map((o) => product(m, o)).join("\n      ")}
    }`,
      )
      .join("\n    ")}
    }`;
}

/** Weight row `r` of the workgroup, clamped into the matrix; with `silu-mul` gates and ups take turns. */
function rowFunction({ tile, outputs, epilogue }: VectorOptions): string {
  const count = vectorTileOutputs(tile, epilogue);
  const row = epilogue === "none" ? "r" : "r / 2u";
  const last = epilogue === "none" ? outputs - 1 : outputs / 2 - 1;
  const up = epilogue === "none" ? "" : ` + (r & 1u) * ${outputs / 2}u`;
  return `fn rowOf(group: u32, r: u32) -> u32 { return min(group * ${count}u + ${row}, ${last}u)${up}; }`;
}

function storeSums({ tile, rows, outputs, lanes }: VectorOptions): string {
  const count = tile.subgroups * tile.outputs;
  return `for (var cell = thread; cell < ${rows * count}u; cell += ${tile.subgroups * lanes}u) {
    let m = cell / ${count}u;
    let n = group.x * ${count}u + cell % ${count}u;
    if (m < parameters.rows && n < ${outputs}u) {
      let at = m * parameters.outputStride + parameters.outputOffset + n;
      if (parameters.accumulate != 0u) { output[at] = output[at] + sums[cell]; } else { output[at] = sums[cell]; }
    }
  }`;
}

/** Two features at a time: one word of the output. */
function storeGated({ tile, rows, outputs, lanes }: VectorOptions): string {
  const words = (tile.subgroups * tile.outputs) / 4;
  return `for (var cell = thread; cell < ${rows * words}u; cell += ${tile.subgroups * lanes}u) {
    let m = cell / ${words}u;
    let feature = group.x * ${words * 2}u + (cell % ${words}u) * 2u;
    if (m < parameters.rows && feature < ${outputs / 2}u) {
      let both = vec4f(gated(cell * 4u), gated(cell * 4u + 2u), 0.0, 0.0);
      output[(m * ${outputs / 2}u + feature) / 2u] = packHalves(both).x;
    }
  }`;
}

const GATED = `${PACK_HALVES_WGSL}
// exp(-gate) stays finite: beyond 88 the sigmoid is 0 in f32 to the last bit that matters.
fn gated(at: u32) -> f32 { return sums[at] / (1.0 + exp(min(-sums[at], 88.0))) * sums[at + 1u]; }
`;

/** WGSL of the kernel; grid: x tiles of outputs (of features, with `silu-mul`). */
export function linearVectorWgsl(options: VectorOptions): string {
  const { tile, rows, epilogue, lanes, shaderF16 } = options;
  const gated = epilogue === "silu-mul";
  const { units } = shares(options);
  const count = tile.subgroups * tile.outputs;
  const cells = range(rows).flatMap((m) => range(tile.outputs).map((o) => ({ m, o })));
  return `requires immediate_address_space;
enable subgroups;
${shaderF16 ? "enable f16;" : ""}
${LINEAR_PARAMETERS}
@group(0) @binding(0) var<storage, read> input: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<${gated ? "u32" : "f32"}>;
// [input][row of weights]
var<workgroup> sums: array<f32, ${rows * count}>;
${shaderF16 ? UNPACK.native : UNPACK.plain}
${rowFunction(options)}
${gated ? GATED : ""}

@compute @workgroup_size(${tile.subgroups * lanes})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % ${lanes}u;
  let first = thread / ${lanes}u * ${tile.outputs}u;
  ${range(tile.outputs)
    .map((o) => `let row${o} = rowOf(group.x, first + ${o}u);`)
    .join("\n  ")}
  ${cells.map(({ m, o }) => `var sum${m}_${o} = vec2f();`).join(" ")}
  for (var u = lane; u < ${Math.ceil(units / (lanes * tile.loads)) * lanes * tile.loads}u; u += ${lanes * tile.loads}u) {
    ${fetchUnits(options)}
    ${range(tile.loads)
      .map((l) => multiplyUnits(options, l))
      .join("\n    ")}
  }
  ${cells
    .map(
      ({ m, o }) => `let whole${m}_${o} = subgroupAdd(sum${m}_${o}.x + sum${m}_${o}.y);
  if (lane == 0u) { sums[first + ${m * count + o}u] = whole${m}_${o}; }`,
    )
    .join("\n  ")}
  workgroupBarrier();
  ${gated ? storeGated(options) : storeSums(options)}
}
`;
}
