/**
 * WGSL of the decode split on 8-bit matrices, for several query heads a KV head. One workgroup of 32 threads takes one
 * (row, KV head, split); factors of its queries are columns of the right matrices, unpacked codes (bytes) the left ones.
 *
 * logit = sum (q scale) code + sum q zero; output = sum (p scale) code + sum p zero. The folded factors (q scale, p scale)
 * are integers of 16 bits in steps of their largest value, cut into two signed bytes: two columns of the matrix. Products
 * of integers are exact, so only that rounding (2^-16 of the largest factor) is lost.
 *
 * Workgroup memory decides how many workgroups an SM holds, so codes are staged a few channels at a time and logits stay
 * in registers (lane = token). Integer sums cannot be rescaled, so p is relative to a reference above the logits so far,
 * and only where a group exceeds it do the sums join the f32 outputs.
 */
import { DECODE_MATRIX_THREADS } from "./kv-decode-matrix-dialect.ts";
import { keyGroup, keyLoads, keyNames, keyVariables, loadQueries, takeKeys } from "./kv-decode-matrix-keys.wgsl.ts";
import {
  type DecodeMatrixModel,
  type DecodeMatrixTemplate,
  FACTOR_FUNCTIONS,
  type Plan,
  planOf,
} from "./kv-decode-matrix-plan.ts";
import {
  addOutputs,
  keepInRange,
  placeFactor,
  storePartials,
  valueGroup,
  valueLanePlace,
  valueLoads,
  valueVariables,
} from "./kv-decode-matrix-values.wgsl.ts";
import { DECODE_SPLIT_STEP } from "./kv-decode-split.ts";
import type { KvFormat, KvShape } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";
import { queryRopeWgsl } from "./kv-query-rope.wgsl.ts";

export type { DecodeMatrixTemplate } from "./kv-decode-matrix-plan.ts";

/**
 * Query heads a KV head from which on matrices are taken. Packed multiply-adds take as long at 4 (measured), and twice as
 * long for twice the queries; a matrix's columns hold four queries for the same codes.
 */
const LEAST_QUERIES = 5;

/** Whether the kernel can hold the format and shape, and is worth it. */
export function decodeMatrixSupports(format: KvFormat, shape: KvShape, heads: number): boolean {
  return (
    format.keyBits < 16 &&
    format.valueBits < 16 &&
    (shape.headDim === 64 || shape.headDim === 128) &&
    heads / shape.kvHeads >= LEAST_QUERIES
  );
}

/** Most query heads of a workgroup: each costs 16 registers of accumulators, outputs and q at 128 channels. */
const MOST_QUERIES = 8;

/** Adds how queries are tiled: as equal as possible. */
export function decodeMatrixTemplate(model: DecodeMatrixModel): DecodeMatrixTemplate {
  const gqa = model.heads / model.shape.kvHeads;
  const queries = Math.ceil(gqa / Math.ceil(gqa / MOST_QUERIES));
  return { ...model, queries };
}

/** Workgroups in y: query tiles of all KV heads. */
export function decodeMatrixTiles({ heads, shape, queries }: DecodeMatrixTemplate): number {
  return shape.kvHeads * Math.ceil(heads / shape.kvHeads / queries);
}

/** Where the lane stands: channels of the K meta, words of the V codes. */
function lanePlaces(plan: Plan): string {
  const { template, parts, metaLanes, codes } = plan;
  const perWord = codesPerWord(template.format.keyBits);
  const metaPerWord = perWord / 4;
  return `  let metaLane = lane & ${metaLanes - 1}u; let quadOf = metaLane / ${parts}u;
  let place = metaLane & ${metaPerWord - 1}u;
  let upper = (place & ${metaPerWord / 2}u) != 0u;
  let jCode = ${metaPerWord === 4 ? "2u * (place & 1u) + (place >> 1u)" : "place"};
  let channel = (metaLane / ${metaPerWord}u) * ${perWord}u + jCode;
  let jWord = ${metaPerWord === 4 ? "jCode" : "(metaLane & 2u) + jCode"};
  if (lane == 0u) { exceeded = 0u; }
  let quad = lane >> 2u; let word = lane & 3u;
  let valueAt = ${codes}u + ${valueLanePlace(template.format.valueBits)} + quad / 4u;`;
}

function groups(plan: Plan): string {
  const { template } = plan;
  return `  ${keyVariables(plan)}
  ${valueVariables(plan)}
  let placeFactor = ${placeFactor(template.format.valueBits)};
  ${keyNames(plan)
    .map((name) => `var n${name} = vec4u();`)
    .join(" ")} var nHead = 0u; var nGroup = 0u; ${template.format.rotated ? "var nNorm = 0u;" : ""}
${keyLoads(plan, "0u")}
  for (var g = 0u; g < count; g++) {
${takeKeys(plan)}
${valueLoads(plan)}
${keyGroup(plan)}
${keepInRange(plan)}
${valueGroup(plan)}
  }
${addOutputs(plan)}`;
}

/**
 * Bindings: qkv f32, pages (as vec4), rows, pageTable, partials, rope table. Grid: splits, `decodeMatrixTiles`, rows.
 * Immediates: {@link DECODE_SPLIT_STEP}; splitTokens is a multiple of 32.
 */
export function decodeMatrixWgsl(template: DecodeMatrixTemplate): string {
  const { shape, format } = template;
  const plan = planOf(template);
  const { dialect, queries } = plan;
  const layout = kvPageLayout(format, shape);
  const tilesPerHead = Math.ceil(template.heads / shape.kvHeads / queries);
  const body = `
@compute @workgroup_size(${DECODE_MATRIX_THREADS}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32) {
  let kvHead = wid.y / ${tilesPerHead}u; let firstQuery = wid.y % ${tilesPerHead}u * ${queries}u;
  let row = params.firstRow + wid.z;
  let position = rows[row].x + params.step;
  let slot = rows[row].y;
  let sealed = position - position % ${shape.residualTokens}u;
  let start = wid.x * params.splitTokens;
  if (start >= sealed) { return; }
  // Groups of 32 tokens: the first of the sequence's, and how many.
  let first = start / 32u;
  let count = (min(start + params.splitTokens, sealed) - start) / 32u;
  var pageId = 0u;
${lanePlaces(plan)}
${loadQueries(plan)}
${groups(plan)}
${storePartials(plan)}
}`;
  return `requires immediate_address_space;
${dialect.directives}
@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> pageTable: array<u32>;
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;
@group(0) @binding(5) var<storage, read> ropeTable: array<vec2f>;
${DECODE_SPLIT_STEP}
${queryRopeWgsl(template)}
var<workgroup> staged: array<vec4<u32>, ${plan.stagedSize}>;
var<workgroup> exceeded: u32;
fn pageStart(page: u32, kvHead: u32) -> u32 { return page * ${layout.page / 4}u + kvHead * ${layout.head / 4}u; }
fn normWord(page: u32, word: u32) -> u32 { return pages[page * ${layout.page / 4}u + ${Math.floor(layout.norms / 4)}u + word / 4u][word & 3u]; }
fn ordered(x: f32) -> u32 { let b = bitcast<u32>(x); return select(b | 0x80000000u, ~b, (b >> 31u) == 1u); }
fn fromOrdered(x: u32) -> f32 { return bitcast<f32>(select(~x, x & 0x7fffffffu, (x >> 31u) == 1u)); }
fn laneTurn(x: vec4f, mask: u32, lane: u32) -> vec4f {
  let other = bitcast<vec4f>(laneXor4(bitcast<vec4u>(x), mask, lane));
  return select(x + other, other - x, (lane & mask) != 0u);
}
${FACTOR_FUNCTIONS}
${body}
${dialect.functions()}`;
}
