/**
 * What decode attention asks of the 32 threads of its workgroup: sums, maxima and exchange between them. Two texts of the
 * same functions: subgroup operations, or workgroup memory for drivers with other subgroup sizes (and for tests).
 */

/** Threads of a workgroup; one subgroup where there are subgroups of 32. */
export const DECODE_LANES = 32;

export type LaneExchange = "subgroup" | "memory";

const SUBGROUP = `
fn laneSum(x: f32, lane: u32) -> f32 { return subgroupAdd(x); }
fn laneMax(x: f32, lane: u32) -> f32 { return fromOrdered(subgroupMax(ordered(x))); }
fn laneTop(x: u32, lane: u32) -> u32 { return subgroupMax(x); }
fn laneXor(x: f32, mask: u32, lane: u32) -> f32 { return subgroupShuffleXor(x, mask); }
fn laneXor2(x: vec2f, mask: u32, lane: u32) -> vec2f { return subgroupShuffleXor(x, mask); }
fn laneRead(x: f32, source: u32, lane: u32) -> f32 { return subgroupShuffle(x, source); }`;

const MEMORY = `
var<workgroup> exchange: array<vec2f, 32>;
fn give(x: vec2f, lane: u32) { workgroupBarrier(); exchange[lane] = x; workgroupBarrier(); }
fn laneSum(x: f32, lane: u32) -> f32 {
  give(vec2f(x, 0.0), lane);
  var sum = 0.0;
  for (var i = 0u; i < 32u * params.one; i++) { sum += exchange[i].x; }
  return sum;
}
fn laneMax(x: f32, lane: u32) -> f32 {
  give(vec2f(x, 0.0), lane);
  var top = exchange[0].x;
  for (var i = 1u; i < 32u * params.one; i++) { top = max(top, exchange[i].x); }
  return top;
}
fn laneTop(x: u32, lane: u32) -> u32 { return bitcast<u32>(laneMax(bitcast<f32>(x), lane)); }
fn laneXor(x: f32, mask: u32, lane: u32) -> f32 { give(vec2f(x, 0.0), lane); return exchange[lane ^ mask].x; }
fn laneXor2(x: vec2f, mask: u32, lane: u32) -> vec2f { give(x, lane); return exchange[lane ^ mask]; }
fn laneRead(x: f32, source: u32, lane: u32) -> f32 { give(vec2f(x, 0.0), lane); return exchange[source].x; }`;

/** Directive lines of a module that uses {@link laneFunctions}. */
export function laneDirectives(exchange: LaneExchange): string {
  return exchange === "subgroup" ? "enable subgroups;" : "";
}

/**
 * Text of `laneSum`, `laneMax` (f32), `laneTop` (largest of non-negative floats, as bits), `laneXor`, `laneXor2` and
 * `laneRead`. All 32 threads must reach each call. The module's immediate `params.one` is 1.
 */
export function laneFunctions(exchange: LaneExchange): string {
  return `
// Signed floats in the order of integers: integer maxima of a subgroup are one instruction on some chips.
fn ordered(x: f32) -> i32 { let b = bitcast<i32>(x); return b ^ ((b >> 31u) & 0x7fffffff); }
fn fromOrdered(x: i32) -> f32 { return bitcast<f32>(x ^ ((x >> 31u) & 0x7fffffff)); }
${exchange === "subgroup" ? SUBGROUP : MEMORY}`;
}
