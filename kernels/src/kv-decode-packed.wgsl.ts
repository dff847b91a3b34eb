/**
 * WGSL of the decode split with packed f16 multiply-adds. A workgroup is 32 lanes: it takes some queries of one KV head
 * of one row over some consecutive splits, a group of 32 tokens at a time, and writes one partial a split and query.
 *
 * logit = sum (q scale) code + sum q zero: lane = token; q scale is folded once a group, 4 channels a lane, and read back
 * from workgroup memory by all. output = sum (p scale) code + sum p zero: lane = one word of V codes of four tokens.
 *
 * A code masked in place, as a pair of f16, is the subnormal code * 2^(place - 24): two codes for one AND. Powers of two
 * that undo the places join q (or the finished output). Where a driver flushes subnormals, the code goes below the
 * exponent of 1 instead, and the ones are taken back from the zeros. Folded factors are scaled by a power of two so that
 * a group's largest is near 2^14: f16 sums neither overflow nor lose small codes. Softmax weights are relative to the
 * group's own largest logit, and join the running sums in f32.
 */
import { each, range } from "./kv-attention-template.ts";
import { DECODE_LANES, laneDirectives, laneFunctions } from "./kv-decode-lanes.ts";
import { keyPhase } from "./kv-decode-packed-keys.wgsl.ts";
import { type DecodePackedTemplate, type PackedPlan, packedPlan, placeFactors } from "./kv-decode-packed-plan.ts";
import { storePartials, valuePhase } from "./kv-decode-packed-values.wgsl.ts";
import { DECODE_SPLIT_STEP, queryTiles } from "./kv-decode-split.ts";
import { KV_GROUP } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";
import { queryRopeWgsl } from "./kv-query-rope.wgsl.ts";

/** Names of what a group's loads fill. */
function loadNames({ keyLoads, valueLoads, template }: PackedPlan): readonly string[] {
  const names = [...range(keyLoads).map((i) => `Key${i}`), "KeyMeta", ...range(valueLoads).map((i) => `Value${i}`)];
  return [...names, "ValueMeta", ...(template.format.rotated ? ["Norm"] : [])];
}

/** Loads group `g` of the sequence, whose page is `page`, into n*. */
function loads({ template, d, keyLoads, valueLoads }: PackedPlan, g: string, page: string): string {
  const { format, shape } = template;
  const layout = kvPageLayout(format, shape);
  const norm = `pages[${page} * ${layout.page / 4}u + ${layout.norms / 4}u + group * 4u + lane / 8u][(lane / 2u) & 3u]`;
  return `    { let group = ${g} % ${shape.blockTokens / KV_GROUP}u; let at = ${page} * ${layout.page / 4}u + kvHead * ${layout.head / 4}u;
      let keyAt = at + group * ${keyLoads * 32}u + lane; let valueAt = at + ${layout.valueCodes / 4}u + group * ${valueLoads * 32}u + lane;
      let metaAt = at + group * ${d / 4}u + metaLane;
      ${each(keyLoads, (i) => `nKey${i} = pages[keyAt + ${i * 32}u];`, " ")} nKeyMeta = pages[metaAt + ${layout.keyMeta / 4}u];
      ${each(valueLoads, (i) => `nValue${i} = pages[valueAt + ${i * 32}u];`, " ")} nValueMeta = pages[metaAt + ${layout.valueMeta / 4}u];
      ${format.rotated ? `nNorm = ${norm};` : ""} }`;
}

/** q{r}: the lane's four channels (c, c + C/2, c + 1, c + 1 + C/2), turned, rotated, times the factor of the logits. */
function loadQueries({ template, d, queries, metaLanes, key }: PackedPlan): string {
  const { shape, heads, format } = template;
  const width = (heads + 2 * shape.kvHeads) * d;
  const gqa = heads / shape.kvHeads;
  const scale = template.scale * Math.LOG2E * (format.rotated ? 1 / Math.sqrt(d) : 1);
  const channel = (i: number) => `channel + ${(i & 1) * key.pairs + (i >> 1)}u`;
  const rotate = (r: number) => `
  q${r} = vec4f(q${r}.x + q${r}.y, q${r}.x - q${r}.y, q${r}.z + q${r}.w, q${r}.z - q${r}.w);
  q${r} = vec4f(q${r}.x + q${r}.z, q${r}.y + q${r}.w, q${r}.x - q${r}.z, q${r}.y - q${r}.w);
  for (var mask = 1u; mask < ${metaLanes}u * params.one; mask *= 2u) {
    let other = vec4f(laneXor2(q${r}.xy, mask, lane), laneXor2(q${r}.zw, mask, lane));
    q${r} = select(q${r} + other, other - q${r}, (lane & mask) != 0u);
  }`;
  return `  let channel = (metaLane / ${key.pairs / 2}u) * ${2 * key.pairs}u + (metaLane % ${key.pairs / 2}u) * 2u;
${each(
  queries,
  (
    r,
  ) => `  let head${r} = kvHead * ${gqa}u + min(firstQuery + ${r}u, ${gqa - 1}u); let base${r} = row * ${width}u + head${r} * ${d}u;
  var q${r} = vec4f(${each(4, (i) => `turnedQuery(base${r}, ${channel(i)}, position)`, ", ")}) * ${scale};${format.rotated ? rotate(r) : ""}`,
)}`;
}

function declarations(plan: PackedPlan): string {
  const { queries, value } = plan;
  return `${each(queries, (r) => `  var top${r} = -1.0e30; var total${r} = 0.0; var z${r} = 0.0; ${each(value.pairs, (j) => `var a${r}_${j} = vec2f();`, " ")}`)}
  ${loadNames(plan)
    .map((name) => (name === "Norm" ? "var nNorm = 0u;" : `var n${name} = vec4u();`))
    .join(" ")}`;
}

function head(plan: PackedPlan): string {
  const { template, d, queries, parts } = plan;
  return `requires immediate_address_space;
enable f16;
${laneDirectives(template.exchange)}
@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<vec4u>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> pageTable: array<u32>;
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;
@group(0) @binding(5) var<storage, read> ropeTable: array<vec2f>;
${DECODE_SPLIT_STEP}
// q scale as f16 pairs in the order of K's words; p of 32 tokens; p scale as four tokens' f16 a (quad, 32 channels).
var<workgroup> folded: array<vec4u, ${(queries * d) / 8}>;
var<workgroup> probs: array<vec4f, ${queries * 8}>;
var<workgroup> weights: array<vec2u, ${queries * 8 * parts}>;
${laneFunctions(template.exchange)}
${queryRopeWgsl(template)}`;
}

/**
 * Bindings: qkv f32, pages, rows, pageTable, partials, ropeTable. Immediates: {@link DECODE_SPLIT_STEP}. Grid: splits of
 * the longest row over walk, kvHeads × tiles of queries, rows.
 */
export function decodePackedWgsl(template: DecodePackedTemplate): string {
  const plan = packedPlan(template);
  const { shape, maxPages, heads, queries } = template;
  const { tiles } = queryTiles(heads / shape.kvHeads, queries);
  const { metaLanes, valueWords, parts } = plan;
  const perWord = codesPerWord(template.format.valueBits);
  const pageGroups = shape.blockTokens / KV_GROUP;
  const names = loadNames(plan);
  const pageOf = (g: string) => `pageTable[slot * ${maxPages}u + ${g} / ${pageGroups}u]`;
  return `${head(plan)}
@compute @workgroup_size(${DECODE_LANES}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32) {
  let kvHead = wid.y / ${tiles}u; let firstQuery = wid.y % ${tiles}u * ${queries}u;
  let row = params.firstRow + wid.z;
  let position = rows[row].x + params.step;
  let slot = rows[row].y;
  let sealed = position - position % ${shape.residualTokens}u;
  var split = wid.x * params.walk;
  let start = split * params.splitTokens;
  if (start >= sealed) { return; }
  let splitGroups = params.splitTokens / 32u;
  // Groups of the sequence: the first and the one after the last.
  let first = start / 32u;
  let end = min(start + params.walk * params.splitTokens, sealed) / 32u;
  let metaLane = lane & ${metaLanes - 1}u;
  // Weights of the lane's word in its first vec4: (quad, part).
  let valueAt = (lane / ${valueWords}u) * ${parts}u + (lane % ${valueWords}u) * ${perWord}u / 32u;
${declarations(plan)}
  var nextPage = ${pageOf("first")};
${loads(plan, "first", "nextPage")}
  nextPage = ${pageOf("min(first + 1u, end - 1u)")};
${loadQueries(plan)}
${placeFactors(plan)}
  var left = splitGroups;
  for (var g = first; g < end; g++) {
    ${names.map((name) => `let c${name} = n${name};`).join(" ")}
    // The next group's bytes travel while this one is worked on; the page of the one after that is known in time.
    let following = min(g + 1u, end - 1u);
${loads(plan, "following", "nextPage")}
    nextPage = ${pageOf("min(g + 2u, end - 1u)")};
${keyPhase(plan)}
${valuePhase(plan)}
    left--;
    if (left == 0u || g + 1u == end) {
${storePartials(plan)}
      left = splitGroups;
      split++;
    }
  }
}`;
}
