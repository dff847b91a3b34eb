/**
 * Linear layer for one or two decode rows by f32 multiply-adds: f16 inputs, weights of any encoding in layout `rows`.
 *
 * A row of weights is read by one subgroup, or by `slices` of them; lanes own every `lanes`-th unit of 16 bytes, and keep
 * the inputs that meet these units in registers while they go through `passes` rows of weights, the next row on its way.
 * The bits are not those of the matrix kernels, and depend on the subgroup's size: for `fast` numerics only.
 */
import { PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import { LINEAR_PARAMETERS } from "./linear-parameters.wgsl.ts";
import type { WeightEncoding } from "./weight-encoding.ts";

/** Shape of a workgroup: `groups · slices` subgroups. */
export interface VectorTile {
  /** Rows of weights that a subgroup goes through; even with `silu-mul`, where half of them are gates. */
  readonly passes: number;
  readonly groups: number;
  /** Subgroups that share a row of weights. */
  readonly slices: number;
}

export interface VectorOptions {
  readonly encoding: WeightEncoding;
  readonly tile: VectorTile;
  /** Most input rows of a dispatch: 1 or 2, since each takes registers. */
  readonly rows: 1 | 2;
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

/** How a row's units are shared out. */
function shares({ encoding, tile, columns, lanes }: VectorOptions) {
  const units = columns / UNIT_COLUMNS[encoding.format];
  const ofSlice = Math.ceil(units / tile.slices);
  const ofLane = Math.ceil(ofSlice / lanes);
  return { units, ofSlice, ofLane, whole: ofSlice * tile.slices === units && ofLane * lanes === ofSlice };
}

/** Outputs (features, with `silu-mul`) of a workgroup. */
export function vectorTileOutputs(tile: VectorTile, epilogue: VectorOptions["epilogue"]): number {
  return (tile.groups * tile.passes) / (epilogue === "silu-mul" ? 2 : 1);
}

/** Input vec4s that meet a unit: halves or, for f32 weights, half a vec4. */
function inputSetup(options: VectorOptions): string {
  const { encoding, rows, columns } = options;
  const { units, ofSlice, ofLane, whole } = shares(options);
  const unitColumns = UNIT_COLUMNS[encoding.format];
  const lines: string[] = [];
  for (const l of range(ofLane)) {
    const inSlice = `lane + ${l * options.lanes}u`;
    const unit = `slice * ${ofSlice}u + ${inSlice}`;
    lines.push(`let unit${l} = ${whole ? unit : `min(${unit}, ${units - 1}u)`};`);
    if (!whole) lines.push(`let live${l} = ${inSlice} < ${ofSlice}u && ${unit} < ${units}u;`);
    for (const m of range(rows)) {
      for (const word of range(unitColumns / 2)) {
        const at = `(min(${m}u, parameters.rows - 1u) * ${columns / 2}u + unit${l} * ${unitColumns / 2}u + ${word}u)`;
        const value = `unpack2x16float(input[${at} / 4u][${at} % 4u])`;
        lines.push(`let x${m}_${l}_${word} = ${whole ? value : `select(vec2f(), ${value}, live${l})`};`);
      }
      if (encoding.scales.startsWith("pair")) {
        const words = range(unitColumns / 2).map((word) => `x${m}_${l}_${word}`);
        lines.push(`let total${m}_${l} = dot(${words.join(" + ")}, vec2f(1.0));`);
      }
    }
  }
  return lines.join("\n  ");
}

/** Sets `{prefix}c` and `{prefix}s` of every unit of the lane from weight row `row`. */
function fetchRow(options: VectorOptions, prefix: string, row: string): string {
  const { encoding, columns } = options;
  const { units, ofLane } = shares(options);
  const perGroup = encoding.group / UNIT_COLUMNS[encoding.format];
  return range(ofLane)
    .flatMap((l) => {
      const codes = `${prefix}c${l} = codes[${row} * ${units}u + unit${l}];`;
      if (encoding.scales === "none") return [codes];
      const group = perGroup >= 1 ? `unit${l} / ${perGroup}u` : `unit${l} * ${1 / perGroup}u`;
      return [codes, `${prefix}s${l} = ${scaleText(encoding, `${row} * ${columns / encoding.group}u + ${group}`)};`];
    })
    .join("\n      ");
}

function registers(options: VectorOptions, prefix: string): string {
  const scaled = options.encoding.scales !== "none";
  return range(shares(options).ofLane)
    .map((l) => `var ${prefix}c${l} = vec4<u32>();${scaled ? ` var ${prefix}s${l} = vec2f();` : ""}`)
    .join(" ");
}

/** Adds the products of unit `l` to the sums. */
function multiplyUnit({ encoding, rows }: VectorOptions, l: number): string {
  const pairs = unitPairs(encoding, `c${l}`);
  const x = (m: number, column: number) => `x${m}_${l}_${column >> 1}.${column % 2 === 0 ? "x" : "y"}`;
  const chain = (m: number, start: string) =>
    pairs.reduce((sum, { columns: [a, b] }, i) => `fma(w${i}, vec2f(${x(m, a)}, ${x(m, b)}), ${sum})`, start);
  const products = range(rows).map((m) => {
    if (encoding.scales === "none") return `sum${m} = ${chain(m, `sum${m}`)};`;
    const minimum = encoding.scales === "scale32" ? "0.0" : `total${m}_${l}`;
    return `{ let d = ${chain(m, "vec2f()")}; sum${m} = fma(s${l}, vec2f(d.x + d.y, ${minimum}), sum${m}); }`;
  });
  return `{
      ${pairs.map(({ text }, i) => `let w${i} = ${text};`).join(" ")}
      ${products.join("\n      ")}
    }`;
}

/** Weight row of pass `p`, clamped into the matrix. */
function rowFunction({ outputs, epilogue }: VectorOptions): string {
  return epilogue === "none"
    ? `fn rowOf(first: u32, p: u32) -> u32 { return min(first + p, ${outputs - 1}u); }`
    : `fn rowOf(first: u32, p: u32) -> u32 { return min(first / 2u + p / 2u, ${outputs / 2 - 1}u) + (p & 1u) * ${outputs / 2}u; }`;
}

/** `sumOf(m, r)`: row r of the workgroup's weights with input m, slices added in order. */
function sumFunction({ tile, rows }: VectorOptions): string {
  const { passes, groups, slices } = tile;
  return `
var<workgroup> sums: array<f32, ${rows * passes * groups * slices}>;
fn sumOf(m: u32, r: u32) -> f32 {
  let at = (m * ${passes * groups}u + r) * ${slices}u;
  var sum = sums[at];
  ${range(slices - 1)
    .map((s) => `sum += sums[at + ${s + 1}u];`)
    .join(" ")}
  return sum;
}`;
}

function storeSums({ tile, rows, outputs, lanes }: VectorOptions): string {
  const count = tile.passes * tile.groups;
  return `for (var cell = thread; cell < ${rows * count}u; cell += ${tile.groups * tile.slices * lanes}u) {
    let m = cell / ${count}u;
    let n = group.x * ${count}u + cell % ${count}u;
    if (m < parameters.rows && n < ${outputs}u) {
      let at = m * parameters.outputStride + parameters.outputOffset + n;
      let sum = sumOf(m, cell % ${count}u);
      if (parameters.accumulate != 0u) { output[at] = output[at] + sum; } else { output[at] = sum; }
    }
  }`;
}

/** Two features at a time: one word of the output. */
function storeGated({ tile, rows, outputs, lanes }: VectorOptions): string {
  const count = (tile.passes * tile.groups) / 4;
  return `for (var cell = thread; cell < ${rows * count}u; cell += ${tile.groups * tile.slices * lanes}u) {
    let m = cell / ${count}u;
    let r = (cell % ${count}u) * 4u;
    let feature = group.x * ${count * 2}u + r / 2u;
    if (m < parameters.rows && feature < ${outputs / 2}u) {
      output[(m * ${outputs / 2}u + feature) / 2u] = packHalves(vec4f(gated(m, r), gated(m, r + 2u), 0.0, 0.0)).x;
    }
  }`;
}

const GATED = `${PACK_HALVES_WGSL}
// exp(-gate) stays finite: beyond 88 the sigmoid is 0 in f32 to the last bit that matters.
fn gated(m: u32, r: u32) -> f32 {
  let gate = sumOf(m, r);
  return gate / (1.0 + exp(min(-gate, 88.0))) * sumOf(m, r + 1u);
}
`;

/** WGSL of the kernel; grid: x tiles of outputs (of features, with `silu-mul`). */
export function linearVectorWgsl(options: VectorOptions): string {
  const { encoding, tile, rows, epilogue, lanes, shaderF16 } = options;
  const { passes, groups, slices } = tile;
  const gated = epilogue === "silu-mul";
  const ls = range(shares(options).ofLane);
  const ms = range(rows);
  const scaled = encoding.scales !== "none";
  return `requires immediate_address_space;
enable subgroups;
${shaderF16 ? "enable f16;" : ""}
${LINEAR_PARAMETERS}
@group(0) @binding(0) var<storage, read> input: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> codes: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<${gated ? "u32" : "f32"}>;
${shaderF16 ? UNPACK.native : UNPACK.plain}
${rowFunction(options)}
${sumFunction(options)}
${gated ? GATED : ""}

@compute @workgroup_size(${groups * slices * lanes})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % ${lanes}u;
  let slice = (thread / ${lanes}u) % ${slices}u;
  let firstPass = (thread / ${lanes * slices}u) * ${passes}u;
  let first = group.x * ${groups * passes}u + firstPass;
  ${inputSetup(options)}
  ${registers(options, "")}
  {
    let row = rowOf(first, 0u);
    ${fetchRow(options, "", "row")}
  }
  for (var p = 0u; p < ${passes}u; p++) {
    ${registers(options, "next_")}
    {
      let row = rowOf(first, min(p + 1u, ${passes - 1}u));
      ${fetchRow(options, "next_", "row")}
    }
    ${ms.map((m) => `var sum${m} = vec2f();`).join(" ")}
    ${ls.map((l) => multiplyUnit(options, l)).join("\n    ")}
    ${ms
      .map(
        (m) => `let whole${m} = subgroupAdd(sum${m}.x + sum${m}.y);
    if (lane == 0u) { sums[(${m * passes * groups}u + firstPass + p) * ${slices}u + slice] = whole${m}; }`,
      )
      .join("\n    ")}
    ${ls.map((l) => `c${l} = next_c${l};${scaled ? ` s${l} = next_s${l};` : ""}`).join(" ")}
  }
  workgroupBarrier();
  ${gated ? storeGated(options) : storeSums(options)}
}
`;
}
