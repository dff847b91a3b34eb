/**
 * Kernel of `sample.ts` for GPUs, first half: slices of the vocabulary, many workgroups a row.
 *
 * A slice tells its best key, where it is, and sums of exponentials at temperature 1 and at the row's temperature. Every
 * `subLanes` threads also tell their best key: the k-th best of these bounds the k-th best logit from below.
 */
import { SAMPLE_CHOICE_WGSL, SAMPLE_KEYS_WGSL } from "./sample.wgsl.ts";

export interface SampleSliceTemplate {
  readonly vocabulary: number;
  /** vec4s of a thread. */
  readonly vectors: number;
  /** Neighbouring threads that share one best key: a power of two, at most the subgroup's size and 32. */
  readonly subLanes: number;
  /**
   * `constant`: sizes are part of the text, so that the driver unrolls. `immediate`: they come with each dispatch, so that
   * software drivers, which compile slowly, compile once for many vocabularies.
   */
  readonly sizes: "constant" | "immediate";
}

/** Bytes of the immediates where sizes are such: vocabulary, slices, subs. */
export const SLICE_IMMEDIATE_BYTES = 12;

/** The immediates of {@link SLICE_IMMEDIATE_BYTES}. */
export function sliceImmediates(template: SampleSliceTemplate): Uint32Array {
  return new Uint32Array([template.vocabulary, sliceCount(template), subCount(template)]);
}

/** Declares VOCABULARY, VECTORS_OF_ROW, SLICES and SUBS before a kernel's text. */
export function withSizes(template: SampleSliceTemplate, text: string): string {
  if (template.sizes === "constant") {
    return `${DIRECTIVES}
const VOCABULARY = ${template.vocabulary}u;
const SLICES = ${sliceCount(template)}u;
const SUBS = ${subCount(template)}u;
const VECTORS_OF_ROW = (VOCABULARY + 3u) / 4u;
${text}`;
  }
  return `${DIRECTIVES}
struct Sizes { vocabulary: u32, slices: u32, subs: u32 }
var<immediate> sizes: Sizes;
${text
  .replaceAll("VOCABULARY", "sizes.vocabulary")
  .replaceAll("SLICES", "sizes.slices")
  .replaceAll("SUBS", "sizes.subs")
  .replaceAll("VECTORS_OF_ROW", "((sizes.vocabulary + 3u) / 4u)")}`;
}

const DIRECTIVES = `requires immediate_address_space;
enable subgroups;
diagnostic(off, subgroup_uniformity);`;

/** Threads of a slice. */
export const SLICE_THREADS = 256;
/** Most slices of a row. */
export const MOST_SLICES = 32;
/** Best keys of a row that are wanted, at most. */
const MOST_SUBS = 256;

/** @param subgroupSize lanes of every subgroup. */
export function sampleSlices(
  vocabulary: number,
  subgroupSize: number,
  sizes: SampleSliceTemplate["sizes"],
): SampleSliceTemplate {
  const vectors = Math.max(4, Math.ceil(vocabulary / (4 * SLICE_THREADS * MOST_SLICES)));
  const elements = 4 * vectors;
  const lanes = [8, 16, 32].find((count) => vocabulary <= MOST_SUBS * count * elements) ?? 32;
  return { vocabulary, vectors, subLanes: Math.min(lanes, subgroupSize), sizes };
}

/** Elements of a slice. */
export function sliceElements({ vectors }: SampleSliceTemplate): number {
  return 4 * SLICE_THREADS * vectors;
}

/** Slices of a row. */
export function sliceCount(template: SampleSliceTemplate): number {
  return Math.ceil(template.vocabulary / sliceElements(template));
}

/** Best keys of a row. */
export function subCount(template: SampleSliceTemplate): number {
  return (sliceCount(template) * SLICE_THREADS) / template.subLanes;
}

/** Functions: \`logits4(row, vector)\` gives four logits' bits; what lies behind the vocabulary is minus infinity. */
export function sampleLogitsText({ vocabulary }: SampleSliceTemplate): string {
  if (vocabulary % 4 === 0) {
    return `
@group(0) @binding(0) var<storage, read> logits: array<vec4u>;
fn logits4(row: u32, vector: u32) -> vec4u {
  if (vector >= VECTORS_OF_ROW) { return vec4u(0xff800000u); }
  return logits[row * VECTORS_OF_ROW + vector];
}
fn logitBits(row: u32, at: u32) -> u32 { return logits[row * VECTORS_OF_ROW + at / 4u][at % 4u]; }`;
  }
  return `
@group(0) @binding(0) var<storage, read> logits: array<u32>;
fn logitOr(row: u32, at: u32) -> u32 {
  if (at >= VOCABULARY) { return 0xff800000u; }
  return logits[row * VOCABULARY + at];
}
fn logits4(row: u32, vector: u32) -> vec4u {
  let at = vector * 4u;
  return vec4u(logitOr(row, at), logitOr(row, at + 1u), logitOr(row, at + 2u), logitOr(row, at + 3u));
}
fn logitBits(row: u32, at: u32) -> u32 { return logits[row * VOCABULARY + at]; }`;
}

/** A slice's partial: key, index and (bit 31) whether a logit was not finite, sum, sum at the row's temperature. */
export const SLICE_PARTIAL_BYTES = 16;

/** Bindings: logits, partials, subs, requests. Grid: slices, rows. */
export function sampleSlicesWgsl(template: SampleSliceTemplate): string {
  const { vectors, subLanes } = template;
  const each = (text: (j: number) => string) => Array.from({ length: vectors }, (_, j) => `  ${text(j)}`).join("\n");
  const shuffles: string[] = [];
  for (let mask = 1; mask < subLanes; mask *= 2) {
    shuffles.push(`  subBest = max(subBest, subgroupShuffleXor(subBest, ${mask}u));`);
  }
  const text = `
${SAMPLE_KEYS_WGSL}
${SAMPLE_CHOICE_WGSL}
${sampleLogitsText(template)}
@group(0) @binding(1) var<storage, read_write> partials: array<vec4u>;
@group(0) @binding(2) var<storage, read_write> subs: array<u32>;
@group(0) @binding(3) var<storage, read> requests: array<Request>;

// By subgroup; the smallest that drivers have is 4.
var<workgroup> bests: array<u32, ${SLICE_THREADS / 4}>;
var<workgroup> indices: array<u32, ${SLICE_THREADS / 4}>;
var<workgroup> sums: array<vec2f, ${SLICE_THREADS / 4}>;

fn keys4(bits: vec4u) -> vec4u {
  let positive = select(bits | vec4u(0x80000000u), vec4u(0x80000000u), bits == vec4u(0x80000000u));
  let key = select(positive, ~bits, (bits > vec4u(0x80000000u)));
  return select(vec4u(0u), key, (bits & vec4u(0x7f800000u)) != vec4u(0x7f800000u));
}
fn sum4(x: vec4f) -> f32 { return (x.x + x.y) + (x.z + x.w); }

@compute @workgroup_size(${SLICE_THREADS})
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_index) lane: u32,
  @builtin(subgroup_size) size: u32,
  @builtin(subgroup_invocation_id) inSubgroup: u32,
) {
  let row = group.y;
  let first = group.x * ${SLICE_THREADS * vectors}u + (lane / 32u) * ${32 * vectors}u + lane % 32u;
${each((j) => `let x${j} = logits4(row, first + ${32 * j}u); let k${j} = keys4(x${j});`)}
  var best4 = k0;
${each((j) => (j === 0 ? "" : `best4 = max(best4, k${j});`))}
  let mine = max(max(best4.x, best4.y), max(best4.z, best4.w));
  var subBest = mine;
${shuffles.join("\n")}
  if (lane % ${subLanes}u == 0u) { subs[row * SUBS + (group.x * ${SLICE_THREADS}u + lane) / ${subLanes}u] = subBest; }
  let subgroupBest = subgroupMax(mine);
  if (inSubgroup == 0u) { bests[lane / size] = subgroupBest; }
  workgroupBarrier();
  var best = 0u;
  for (var other = 0u; other < ${SLICE_THREADS}u / size; other++) { best = max(best, bests[other]); }
  let top = valueOf(max(best, 1u));
  var index = 0x7fffffffu;
  var absent = 0u;
  var sum = vec4f();
${each(
  (j) => `{
    let at = (first + ${32 * j}u) * 4u;
    if (k${j}.w == best) { index = min(index, at + 3u); }
    if (k${j}.z == best) { index = min(index, at + 2u); }
    if (k${j}.y == best) { index = min(index, at + 1u); }
    if (k${j}.x == best) { index = min(index, at); }
    let isAbsent = k${j} == vec4u();
    absent += dot(select(vec4u(), vec4u(1u), isAbsent), vec4u(1u));
    sum += select(exp(bitcast<vec4f>(x${j}) - top), vec4f(), isAbsent);
  }`,
)}
  // Absent elements behind the vocabulary are no fault.
  let begin = first * 4u;
  var behind = 0u;
${each((j) => `behind += clamp(begin + ${128 * j + 4}u, VOCABULARY, VOCABULARY + 4u) - VOCABULARY;`)}
  let bad = absent != behind;
  let request = requests[row];
  var warmSum = vec4f();
  if (request.temperature > 0.0) {
    let inverse = 1.0 / max(request.temperature, 1e-6);
${each((j) => `warmSum += select(exp(max((bitcast<vec4f>(x${j}) - top) * inverse, vec4f(-100.0))), vec4f(), k${j} == vec4u());`)}
  }
  let total = subgroupAdd(vec2f(sum4(sum), sum4(warmSum)));
  let place = subgroupMin(index);
  let anyBad = subgroupAny(bad);
  if (inSubgroup == 0u) {
    sums[lane / size] = total;
    indices[lane / size] = place | select(0u, 0x80000000u, anyBad);
  }
  workgroupBarrier();
  if (lane == 0u) {
    var all = vec2f();
    var lowest = 0x7fffffffu;
    var flag = 0u;
    for (var other = 0u; other < ${SLICE_THREADS}u / size; other++) {
      all += sums[other];
      lowest = min(lowest, indices[other] & 0x7fffffffu);
      flag |= indices[other] & 0x80000000u;
    }
    partials[row * SLICES + group.x] = vec4u(best, lowest | flag, bitcast<u32>(all.x), bitcast<u32>(all.y));
  }
}
`;
  return withSizes(template, text);
}
