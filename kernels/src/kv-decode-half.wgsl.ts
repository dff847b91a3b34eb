/**
 * WGSL of the decode split over f16 pages. A workgroup is 32 lanes: it takes some queries of one KV head of one row over
 * one split, 32 tokens at a time. Logits: lane = token, 16 bytes a load; output: lane = words of V of four
 * tokens. All of K's bytes of a group are under way at once, and V's while K is worked on.
 */
import { each, range } from "./kv-attention-template.ts";
import { DECODE_LANES, type LaneExchange, laneDirectives, laneFunctions } from "./kv-decode-lanes.ts";
import { DECODE_SPLIT_STEP, queryTiles } from "./kv-decode-split.ts";
import { KV_GROUP, type KvFormat, type KvShape } from "./kv-format.ts";
import { kvPageLayout } from "./kv-layout.ts";
import { type QueryRope, queryRopeWgsl } from "./kv-query-rope.wgsl.ts";

export interface DecodeHalfTemplate extends QueryRope {
  /** "f16". */
  readonly format: KvFormat;
  readonly shape: KvShape;
  /** Query heads: a multiple of shape.kvHeads. */
  readonly heads: number;
  /** Query heads of one workgroup. */
  readonly queries: number;
  readonly maxPages: number;
  /** Factor of the logits. */
  readonly scale: number;
  readonly exchange: LaneExchange;
}

/** Whether the kernel can hold the format and shape. */
export function decodeHalfSupports(format: KvFormat, { headDim }: KvShape): boolean {
  return format.keyBits === 16 && format.valueBits === 16 && !format.rotated && (headDim === 64 || headDim === 128);
}

const XYZW = ["x", "y", "z", "w"];

/** Software drivers compile loops faster than what is unrolled, and have no loads to keep under way. */
const rolled = (template: DecodeHalfTemplate) => template.exchange === "memory";

function keyPhase(template: DecodeHalfTemplate): string {
  const { queries, shape } = template;
  const columns = shape.headDim / 8;
  const column = (key: string, at: (r: number) => string) =>
    `{ let k = ${key}; let a = vec4f(unpack2x16float(k.x), unpack2x16float(k.y)); let b = vec4f(unpack2x16float(k.z), unpack2x16float(k.w));
      ${each(queries, (r) => `s${r} += dot(a, turned[${at(r)}]) + dot(b, turned[${at(r)} + 1u]);`, " ")} }`;
  const sums = rolled(template)
    ? `for (var c = 0u; c < ${columns}u * params.one; c++) ${column("pages[here + c * 32u]", (r) => `${r * columns * 2}u + 2u * c`)}`
    : each(columns, (c) => `    ${column(`key${c}`, (r) => `${(r * columns + c) * 2}u`)}`);
  return `${each(queries, (r) => `    var s${r} = 0.0;`)}
${sums}
${each(
  queries,
  (
    r,
  ) => `    let next${r} = max(top${r}, laneMax(s${r}, lane)); let keep${r} = exp2(top${r} - next${r}); top${r} = next${r};
    let p${r} = exp2(s${r} - next${r}); total${r} = fma(total${r}, keep${r}, p${r}); probs[${r * 8}u + lane / 4u][lane & 3u] = p${r};`,
)}`;
}

function valuePhase(template: DecodeHalfTemplate, codes: number): string {
  const { queries, shape } = template;
  const words = shape.headDim / 2 / DECODE_LANES;
  const quad = (
    value: (w: number) => string,
    at: (r: number) => string,
  ) => `{ ${each(queries, (r) => `let p${r} = probs[${at(r)}];`, " ")}
${each(words, (w) => `      { let word = ${value(w)}; ${each(4, (t) => `{ let v = unpack2x16float(word.${XYZW[t]}); ${each(queries, (r) => `a${r}_${w} = fma(vec2f(p${r}.${XYZW[t]}), v, a${r}_${w});`, " ")} }`, " ")} }`)} }`;
  const sums = rolled(template)
    ? `for (var quad = 0u; quad < 8u * params.one; quad++) ${quad(
        (w) => `pages[here + ${codes + w * 32}u + quad * ${shape.headDim / 2}u]`,
        (r) => `${r * 8}u + quad`,
      )}`
    : each(
        8,
        (i) =>
          `    ${quad(
            (w) => `value${i}_${w}`,
            (r) => `${r * 8 + i}u`,
          )}`,
      );
  return `${each(queries, (r) => each(words, (w) => `    a${r}_${w} *= keep${r};`, " "))}
${sums}`;
}

function storePartials({ queries, shape, heads }: DecodeHalfTemplate): string {
  const d = shape.headDim;
  const gqa = heads / shape.kvHeads;
  const words = d / 2 / DECODE_LANES;
  return each(
    queries,
    (
      r,
    ) => `      { let total = laneSum(total${r}, lane); let out = ((wid.z * ${heads}u + head${r}) * params.splits + wid.x) * ${d + 2}u;
        if (firstQuery + ${r}u < ${gqa}u) {
          ${each(words, (w) => `partials[out + ${w * 64}u + 2u * lane] = a${r}_${w}.x; partials[out + ${w * 64}u + 2u * lane + 1u] = a${r}_${w}.y;`, " ")}
          if (lane == 0u) { partials[out + ${d}u] = top${r}; partials[out + ${d + 1}u] = total; }
        }
      }`,
  );
}

/** Bindings, immediates and grid as in kv-decode-packed.wgsl.ts. */
export function decodeHalfWgsl(template: DecodeHalfTemplate): string {
  const { format, shape, heads, queries, maxPages, scale } = template;
  const d = shape.headDim;
  const layout = kvPageLayout(format, shape);
  const gqa = heads / shape.kvHeads;
  const { tiles } = queryTiles(gqa, queries);
  const columns = d / 8;
  const words = d / 2 / DECODE_LANES;
  const pageGroups = shape.blockTokens / KV_GROUP;
  const codes = layout.valueCodes / 4;
  const early = (statements: readonly string[]) => (rolled(template) ? "" : statements.join(" "));
  const width = (heads + 2 * shape.kvHeads) * d;
  const at = (g: string) =>
    `pageTable[slot * ${maxPages}u + ${g} / ${pageGroups}u] * ${layout.page / 4}u + kvHead * ${layout.head / 4}u + (${g} % ${pageGroups}u) * ${d * 4}u + lane`;
  return `requires immediate_address_space;
${laneDirectives(template.exchange)}
@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<vec4u>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> pageTable: array<u32>;
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;
@group(0) @binding(5) var<storage, read> ropeTable: array<vec2f>;
${DECODE_SPLIT_STEP}
var<workgroup> turned: array<vec4f, ${(queries * d) / 4}>;
var<workgroup> probs: array<vec4f, ${queries * 8}>;
${laneFunctions(template.exchange)}
${queryRopeWgsl(template)}
@compute @workgroup_size(${DECODE_LANES}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32) {
  let kvHead = wid.y / ${tiles}u; let firstQuery = wid.y % ${tiles}u * ${queries}u;
  let row = params.firstRow + wid.z;
  let position = rows[row].x + params.step;
  let slot = rows[row].y;
  let sealed = position - position % ${shape.residualTokens}u;
  let start = wid.x * params.splitTokens;
  if (start >= sealed) { return; }
  let first = start / 32u;
  let end = min(start + params.splitTokens, sealed) / 32u;
${each(queries, (r) => `  let head${r} = kvHead * ${gqa}u + min(firstQuery + ${r}u, ${gqa - 1}u); var top${r} = -1.0e30; var total${r} = 0.0; ${each(words, (w) => `var a${r}_${w} = vec2f();`, " ")}`)}
  var here = ${at("first")};
  ${early(range(columns).map((c) => `var nKey${c} = pages[here + ${c * 32}u];`))}
${each(
  queries,
  (r) =>
    `  for (var i = lane; i < ${d}u * params.one; i += 32u) { turned[${(r * d) / 4}u + i / 4u][i % 4u] = turnedQuery(row * ${width}u + head${r} * ${d}u, i, position) * ${scale * Math.LOG2E}; }`,
)}
  workgroupBarrier();
  for (var g = first; g < end; g++) {
    ${early(range(8).flatMap((quad) => range(words).map((w) => `let value${quad}_${w} = pages[here + ${codes + quad * (d / 2) + w * 32}u];`)))}
    ${early(range(columns).map((c) => `let key${c} = nKey${c};`))}
    let following = min(g + 1u, end - 1u);
    let next = ${at("following")};
${keyPhase(template)}
    ${early(range(columns).map((c) => `nKey${c} = pages[next + ${c * 32}u];`))}
    workgroupBarrier();
${valuePhase(template, codes)}
    here = next;
    workgroupBarrier();
  }
${storePartials(template)}
}`;
}
