/**
 * WGSL of attention over sealed pages and f16 tokens. Three entry points share one body:
 *
 * - prefill: a tile of query rows of one residual window; all sealed groups before the window, then the window's f16 rows;
 * - split: one row, 256 sealed tokens, unnormalized result to a partial;
 * - merge: one row's partials in order, then its residual.
 *
 * A workgroup is LANES threads that act as one vector. For logits a lane is a token (32 / LANES vectors make a group of
 * 32); for the output a lane is a channel. Folded as in KIVI's algebra: logit = sum (q scale) code + sum q zero, output =
 * sum (p scale) code + sum p zero. Codes are masked in place, not shifted down: lane c's factor 2^-(bits * place) is
 * exact and joins q (or the finished output). Softmax is online in base 2, over groups of 32 in order of position, so a
 * row's result does not depend on the other rows of its tile.
 */
import { PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import { halfLogits, halfOutput } from "./kv-attention-half.wgsl.ts";
import { finishSealed, sealedLogits, sealedOutput } from "./kv-attention-sealed.wgsl.ts";
import {
  type AttentionTemplate,
  each,
  range,
  SENTINEL,
  type Shapes,
  SPLIT_TOKENS,
  shapesOf,
} from "./kv-attention-template.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";

function reductions({ template, lanes }: Shapes): string {
  if (template.lanePlan.subgroups) {
    return `
fn laneSum(x: f32, lane: u32) -> f32 { return subgroupAdd(x); }
fn laneMax(x: f32, lane: u32) -> f32 { return subgroupMax(x); }`;
  }
  const tree = (name: string, combine: string) => `
fn ${name}(x: f32, lane: u32) -> f32 {
  workgroupBarrier();
  reduce[lane] = x;
  workgroupBarrier();
  var total = reduce[0];
  for (var i = 1u; i < ${lanes}u * params.one; i++) { total = ${combine}; }
  return total;
}`;
  return tree("laneSum", "total + reduce[i]") + tree("laneMax", "max(total, reduce[i])");
}

/** Online softmax of s{v}_{m}: leaves p{v}_{m}, updates top{m}, total{m}, and scales the accumulators. */
function softmaxStep(s: Shapes, masked: boolean): string {
  const { tokenVectors, queries, channelVectors, parts } = s;
  const quantized = !masked && s.template.format.valueBits < 16;
  return each(queries, (m) => {
    const best = range(tokenVectors).reduce((text, v) => (text ? `max(${text}, s${v}_${m})` : `s${v}_${m}`), "");
    const p = (v: number) =>
      masked ? `select(0.0, exp2(s${v}_${m} - next), seen${v}_${m})` : `exp2(s${v}_${m} - next)`;
    return `    ${each(tokenVectors, (v) => `var p${v}_${m} = 0.0;`, " ")}
    { let next = max(top${m}, laneMax(${best}, lane));
      let keep = select(exp2(top${m} - next), 1.0, next == top${m});
      top${m} = next;
      ${each(tokenVectors, (v) => `p${v}_${m} = ${p(v)};`, " ")}
      total${m} = fma(total${m}, keep, ${each(tokenVectors, (v) => `p${v}_${m}`, " + ")});
      ${each(channelVectors, (c) => `o${m}_${c} *= keep;`, " ")} ${quantized ? each(parts, (g) => `zero${m}_${g} *= keep;`, " ") : ""} }`;
  });
}

function declarations(s: Shapes): string {
  const { queries, channelVectors, parts } = s;
  return each(
    queries,
    (m) =>
      `  var top${m} = ${SENTINEL}; var total${m} = 0.0; ${each(channelVectors, (c) => `var o${m}_${c} = 0.0;`, " ")} ${each(parts, (g) => `var zero${m}_${g} = 0.0;`, " ")}`,
  );
}

function sealedLoop(s: Shapes, from: string, to: string): string {
  const { template } = s;
  const layout = kvPageLayout(template.format, template.shape);
  const groups = template.shape.blockTokens / 32;
  return `  for (var g = ${from}; g < ${to}; g++) {
    let pageStart = pageTable[slot * ${template.maxPages}u + g / ${groups}u] * ${layout.page}u;
    let page = pageStart + kvHead * ${layout.head}u;
    let norms = pageStart + ${layout.norms}u;
    let group = g % ${groups}u;
${sealedLogits(s)}
${softmaxStep(s, false)}
${sealedOutput(s)}
  }`;
}

/** Multiplies o by the Hadamard matrix through workgroup memory. */
function unrotate(s: Shapes): string {
  const { d, lanes, channelVectors, queries, template } = s;
  if (!template.format.rotated) return "";
  return `  workgroupBarrier();
${each(queries, (m) => each(channelVectors, (c) => `  qSealed[${m * d + c * lanes}u + lane] = o${m}_${c};`))}
  rotate(lane);
${each(queries, (m) => each(channelVectors, (c) => `  o${m}_${c} = qSealed[${m * d + c * lanes}u + lane];`))}`;
}

function rotateFunction({ d, lanes, queries }: Shapes): string {
  return `
// Orthonormal Hadamard transform of each query's d values in qSealed.
fn rotate(lane: u32) {
  for (var stride = 1u; stride < ${d}u * params.one; stride *= 2u) {
    workgroupBarrier();
    for (var i = lane; i < ${(queries * d) / 2}u * params.one; i += ${lanes}u) {
      let at = (i / stride) * 2u * stride + i % stride;
      let a = qSealed[at]; let b = qSealed[at + stride];
      qSealed[at] = a + b; qSealed[at + stride] = a - b;
    }
  }
  workgroupBarrier();
  for (var i = lane; i < ${queries * d}u * params.one; i += ${lanes}u) { qSealed[i] *= ${1 / Math.sqrt(d)}; }
  workgroupBarrier();
}`;
}

function loadQueries(s: Shapes): string {
  const { d, lanes, queries, template, kind } = s;
  const heads = template.queryHeads;
  const width = (template.heads + 2 * template.shape.kvHeads) * d;
  const scale = template.scale * Math.LOG2E;
  const row = (m: number) => (kind === "prefill" ? `min(firstRow + ${Math.floor(m / heads)}u, lastRow)` : "row");
  const half = kind !== "split";
  const sealed = kind !== "merge";
  return `${each(queries, (m) => `  for (var c = lane; c < ${d}u * params.one; c += ${lanes}u) { let x = qkv[${row(m)} * ${width}u + (firstHead + ${m % heads}u) * ${d}u + c] * ${scale}; ${sealed ? `qSealed[${m * d}u + c] = x;` : ""} ${half ? `qHalf[${m * d}u + c] = x;` : ""} }`)}
  workgroupBarrier();
${sealed && template.format.rotated ? "  rotate(lane);" : ""}`;
}

function halfLoop(s: Shapes): string {
  return `  for (var first = 0u; first <= last; first += 32u) {
${halfLogits(s)}
${softmaxStep(s, true)}
${halfOutput(s, (token, channel) => `kvRows[halfRow(min(first + ${token}, last)) + valuePlane() + (${channel} >> 1u)]`)}
  }`;
}

function head(s: Shapes, bindings: string): string {
  const { d, lanes, queries, template, parts, kind } = s;
  const bits = template.format.keyBits;
  const words = d / codesPerWord(bits);
  const weights = Math.max(1, parts);
  return `requires immediate_address_space;
${template.lanePlan.subgroups ? "enable subgroups;" : ""}
${bindings}
// one is 1: loops that the driver must not unroll multiply their bound by it.
struct Step { one: u32, firstRow: u32, step: u32 }
var<immediate> params: Step;
var<workgroup> qSealed: array<f32, ${queries * d}>;
${kind === "split" ? "" : `var<workgroup> qHalf: array<f32, ${queries * d}>;`}
var<workgroup> weights: array<f32, ${weights * queries * 32}>;
${template.lanePlan.subgroups ? "" : `var<workgroup> exchange: array<f32, ${queries * 32}>;\nvar<workgroup> reduce: array<f32, ${lanes}>;`}
${reductions(s)}
${template.output === "f16" && kind !== "split" ? PACK_HALVES_WGSL : ""}
${
  kind === "merge"
    ? ""
    : `
fn keyWord(codes: u32, token: u32, word: u32) -> u32 {
  let column = word / 4u;
  return codes + column * 128u + token * min(4u, ${words}u - column * 4u) + word % 4u;
}`
}
${template.format.rotated ? rotateFunction(s) : ""}`;
}

const ENTRY = (lanes: number) =>
  `@compute @workgroup_size(${lanes}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32)`;

function headIndex(s: Shapes): string {
  const { template } = s;
  const gqa = template.heads / template.shape.kvHeads;
  return `  let firstHead = wid.y * ${template.queryHeads}u;
  let kvHead = firstHead / ${gqa}u;`;
}

function storeOutput(s: Shapes): string {
  const { d, lanes, queries, channelVectors, template, kind } = s;
  const heads = template.queryHeads;
  const half = template.output === "f16";
  const row = (m: number) => (kind === "prefill" ? `(firstRow + ${Math.floor(m / heads)}u)` : "row");
  const at = (m: number) => `${row(m)} * ${template.heads * d}u + (firstHead + ${m % heads}u) * ${d}u`;
  const guard = (m: number) => (kind === "prefill" ? `if (firstRow + ${Math.floor(m / heads)}u <= lastRow)` : "");
  const target = (m: number, c: number) =>
    half ? `qHalf[${m * d + c * lanes}u + lane]` : `output[at + ${c * lanes}u + lane]`;
  const normalized = each(
    queries,
    (m) => `  { let total = laneSum(total${m}, lane); let factor = 1.0 / total; let at = ${at(m)};
    ${half ? "" : guard(m)} { ${each(channelVectors, (c) => `${target(m, c)} = o${m}_${c} * factor;`, " ")} } }`,
  );
  if (!half) return normalized;
  // Neighbouring channels belong to neighbouring lanes: they meet in workgroup memory.
  return `  workgroupBarrier();
${normalized}
  workgroupBarrier();
${each(queries, (m) => `  ${guard(m)} { for (var i = lane; i < ${d / 4}u * params.one; i += ${lanes}u) { let c = ${m * d}u + 4u * i; output[(${at(m)}) / 4u + i] = packHalves(vec4f(qHalf[c], qHalf[c + 1u], qHalf[c + 2u], qHalf[c + 3u])); } }`)}`;
}

/** Bindings: qkv, pages, half (chunkKv), tiles, pageTable, output. Grid: tiles, heads / queryHeads. */
export function prefillAttentionWgsl(template: AttentionTemplate): string {
  const s = shapesOf(template, "prefill");
  const { shape } = template;
  const plane = (shape.kvHeads * shape.headDim) / 2;
  return `${head(
    s,
    `@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<u32>;
@group(0) @binding(2) var<storage, read> kvRows: array<u32>;
@group(0) @binding(3) var<storage, read> tiles: array<vec4u>;
@group(0) @binding(4) var<storage, read> pageTable: array<u32>;
@group(0) @binding(5) var<storage, read_write> output: array<${template.output === "f16" ? "vec2u" : "f32"}>;
var<private> halfBase: u32;`,
  )}
fn halfRow(token: u32) -> u32 { return halfBase + token * ${2 * plane}u; }
fn valuePlane() -> u32 { return ${plane}u; }
${ENTRY(s.lanes)} {
${headIndex(s)}
  let tile = tiles[wid.x];
  let firstRow = tile.x;
  let lastRow = tile.x + tile.y - 1u;
  let slot = tile.w;
  let inWindow = tile.z % ${shape.residualTokens}u;
  let sealed = tile.z - inWindow;
  let last = inWindow + tile.y - 1u;
  halfBase = (firstRow - inWindow) * ${2 * plane}u + kvHead * ${shape.headDim / 2}u;
${each(template.tileRows, (r) => `  let see${r} = inWindow + ${r}u;`)}
${loadQueries(s)}
${declarations(s)}
${sealedLoop(s, "0u", "sealed / 32u")}
${finishSealed(s)}
${unrotate(s)}
${halfLoop(s)}
${storeOutput(s)}
}`;
}

/** Bindings: qkv, pages, rows, pageTable, partials. Grid: splits, heads / queryHeads, rows. */
export function splitAttentionWgsl(template: AttentionTemplate): string {
  const s = shapesOf(template, "split");
  const { shape, maxSplits } = template;
  const stride = shape.headDim + 2;
  return `${head(
    s,
    `@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<u32>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> pageTable: array<u32>;
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;`,
  )}
${ENTRY(s.lanes)} {
${headIndex(s)}
  let row = params.firstRow + wid.z;
  let position = rows[row].x + params.step;
  let slot = rows[row].y;
  let sealed = position - position % ${shape.residualTokens}u;
  let start = wid.x * ${SPLIT_TOKENS}u;
  if (start >= sealed) { return; }
  let end = min(start + ${SPLIT_TOKENS}u, sealed);
${loadQueries(s)}
${declarations(s)}
${sealedLoop(s, "start / 32u", "end / 32u")}
${finishSealed(s)}
${each(
  s.queries,
  (m) => `  { let at = ((wid.z * ${template.heads}u + firstHead + ${m}u) * ${maxSplits}u + wid.x) * ${stride}u;
    ${each(s.channelVectors, (c) => `partials[at + ${c * s.lanes}u + lane] = o${m}_${c};`, " ")}
    let total = laneSum(total${m}, lane);
    if (lane == 0u) { partials[at + ${shape.headDim}u] = top${m}; partials[at + ${shape.headDim + 1}u] = total; } }`,
)}
}`;
}

/** Bindings: qkv, half (residual), rows, partials, output. Grid: 1, heads / queryHeads, rows. */
export function mergeAttentionWgsl(template: AttentionTemplate): string {
  const s = shapesOf(template, "merge");
  const { shape, maxSplits } = template;
  const { residualTokens, headDim, kvHeads } = shape;
  const stride = headDim + 2;
  const row = (kvHeads * headDim) / 2;
  return `${head(
    s,
    `@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> kvRows: array<u32>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> partials: array<f32>;
@group(0) @binding(4) var<storage, read_write> output: array<${template.output === "f16" ? "vec2u" : "f32"}>;
var<private> halfBase: u32;`,
  )}
fn halfRow(token: u32) -> u32 { return halfBase + token * ${row}u; }
fn valuePlane() -> u32 { return ${residualTokens * row}u; }
${ENTRY(s.lanes)} {
${headIndex(s)}
  let row = params.firstRow + wid.z;
  let position = rows[row].x + params.step;
  let slot = rows[row].y;
  let last = position % ${residualTokens}u;
  let splits = (position - last + ${SPLIT_TOKENS - 1}u) / ${SPLIT_TOKENS}u;
  halfBase = slot * ${2 * residualTokens * row}u + kvHead * ${headDim / 2}u;
  let see0 = last;
${loadQueries(s)}
${declarations(s)}
${each(
  s.queries,
  (m) => `  for (var split = 0u; split < splits; split++) {
    let at = ((wid.z * ${template.heads}u + firstHead + ${m}u) * ${maxSplits}u + split) * ${stride}u;
    let part = partials[at + ${headDim}u];
    let next = max(top${m}, part);
    let keep = select(exp2(top${m} - next), 1.0, next == top${m});
    let add = select(exp2(part - next), 1.0, next == part);
    top${m} = next;
    // The other kernels keep a total a lane; lane 0 takes what is already summed.
    total${m} = fma(total${m}, keep, select(0.0, partials[at + ${headDim + 1}u] * add, lane == 0u));
    ${each(s.channelVectors, (c) => `o${m}_${c} = fma(o${m}_${c}, keep, partials[at + ${c * s.lanes}u + lane] * add);`, "\n    ")}
  }`,
)}
${unrotate(s)}
${halfLoop(s)}
${storeOutput(s)}
}`;
}
