/**
 * Kernel of `sample.ts` for GPUs, second half: one workgroup a row chooses the token.
 *
 * Greedy rows are done at once. Rows without top-k and top-p draw a slice by its sum, then look at that slice only. Limited
 * rows first try a short list: all logits at or above a bound that few logits reach. Where the kept set may be larger, a
 * histogram over distances from the best logit finds the threshold.
 */
import { SAMPLE_CHOICE_WGSL, SAMPLE_KEYS_WGSL } from "./sample.wgsl.ts";
import { SAMPLE_SEARCH_WGSL } from "./sample-search.wgsl.ts";
import {
  MOST_SLICES,
  type SampleSliceTemplate,
  SLICE_THREADS,
  sampleLogitsText,
  sliceCount,
  sliceElements,
  withSizes,
} from "./sample-slices.wgsl.ts";
import { SAMPLE_THRESHOLD_WGSL } from "./sample-threshold.wgsl.ts";

export interface SamplePickTemplate extends SampleSliceTemplate {
  /** Threads of a workgroup: a multiple of the subgroup's size, 64 … 1024. */
  readonly threads: number;
}

/** Bins of the histogram of distances from the best logit. */
const BINS = 2048;

function constantsText(template: SamplePickTemplate): string {
  const { vectors, subLanes, threads } = template;
  const list = Math.min(512, threads);
  return `
const THREADS = ${threads}u;
const BINS = ${BINS}u;
const LIST = ${list}u;
const SLICE = ${sliceElements(template)}u;
const SUB_LANES = ${subLanes}u;
const SUB_VECTORS = ${subLanes * vectors}u;
// The vector of a row where vector i of a sub's begins: see the loads of the slices.
fn subVector(sub: u32, i: u32) -> u32 {
  let lane = sub * SUB_LANES;
  let inSlice = lane % ${SLICE_THREADS}u;
  let j = i / SUB_LANES;
  return lane / ${SLICE_THREADS}u * ${SLICE_THREADS * vectors}u + inSlice / 32u * ${32 * vectors}u + j * 32u + inSlice % 32u + i % SUB_LANES;
}
// Vectors of a thread in flight.
const AHEAD = ${template.sizes === "constant" ? 4 : 1}u;
var<workgroup> slicePartials: array<vec4u, ${MOST_SLICES}>;
var<workgroup> histogram: array<atomic<u32>, ${BINS}>;
var<workgroup> listKeys: array<u32, ${threads}>;
var<workgroup> listIndices: array<u32, ${threads}>;
var<workgroup> listCount: atomic<u32>;
var<workgroup> sortedKeys: array<u32, ${list}>;
var<workgroup> sortedIndices: array<u32, ${list}>;
var<workgroup> sortedMasses: array<u32, ${list}>;
// By subgroup; the smallest that drivers have is 4.
var<workgroup> scans: array<vec2u, ${threads / 4}>;
var<workgroup> found: vec4u;
var<workgroup> chosen: u32;`;
}

/** Bindings: logits, partials, subs, requests, answers. Grid: x rows. */
export function samplePickSlicesWgsl(template: SamplePickTemplate): string {
  if (sliceCount(template) > MOST_SLICES) throw new RangeError("sample: too many slices");
  const text = `
${SAMPLE_KEYS_WGSL}
${SAMPLE_CHOICE_WGSL}
${sampleLogitsText(template)}
@group(0) @binding(1) var<storage, read> partials: array<vec4u>;
@group(0) @binding(2) var<storage, read> subs: array<u32>;
@group(0) @binding(3) var<storage, read> requests: array<Request>;
@group(0) @binding(4) var<storage, read_write> answers: array<Answer>;
${constantsText(template)}
${SAMPLE_SEARCH_WGSL}
${SAMPLE_THRESHOLD_WGSL}
@compute @workgroup_size(THREADS)
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_index) thread: u32,
  @builtin(subgroup_size) size: u32,
  @builtin(subgroup_invocation_id) inSubgroup: u32,
) {
  let lane = Lane(thread, size, inSubgroup);
  let row = group.x;
  let request = requests[row];
  if (thread < SLICES) { slicePartials[thread] = partials[row * SLICES + thread]; }
  workgroupBarrier();
  var best = vec2u(0u, 0x7fffffffu);
  var nonFinite = 0u;
  for (var slice = 0u; slice < SLICES; slice++) {
    let one = slicePartials[slice];
    if (one.x > best.x) { best = vec2u(one.x, one.y & 0x7fffffffu); }
    nonFinite |= one.y >> 31u;
  }
  let top = valueOf(max(best.x, 1u));
  let inverse = 1.0 / max(request.temperature, 1e-6);
  var total = 0.0;
  var warmTotal = 0.0;
  for (var slice = 0u; slice < SLICES; slice++) {
    let one = slicePartials[slice];
    if (one.x != 0u) {
      let distance = valueOf(one.x) - top;
      total += bitcast<f32>(one.z) * exp(distance);
      warmTotal += bitcast<f32>(one.w) * exp(max(distance * inverse, -100.0));
    }
  }
  // Without one finite logit there is nothing to choose: token 0, and the flag tells.
  if (thread == 0u) {
    chosen = select(best.y, 0u, best.x == 0u);
    found = vec4u(best.x, 0u, 0u, 0u);
  }
  if (request.temperature > 0.0 && workgroupUniformLoad(&found).x != 0u) {
    let random = pcg4d(vec4u(request.seedLow, request.seedHigh, request.position, 0u)).x;
    let limitsCount = request.topK > 0u && request.topK < VOCABULARY;
    let limited = limitsCount || request.topP < 1.0;
    var drawn = false;
    var draw = Draw();
    if (!limited) {
      draw = sliceRange(top, inverse, warmTotal, random);
    } else {
      drawn = drawFromList(row, lane, request, top, inverse, warmTotal, random);
      if (!drawn) { draw = thresholdRange(row, lane, request, top, inverse, warmTotal, random); }
    }
    if (!drawn) { drawIn(row, lane, draw); }
  }
  if (thread == 0u) {
    let value = bitcast<f32>(logitBits(row, chosen));
    answers[row] = Answer(chosen, value - top - log(total), nonFinite, 0u);
  }
}
`;
  return withSizes(template, text);
}
