/** Kernels of `sample.ts`: a scan of slices of the vocabulary, and the choice of one token a row. */

/** Threads of both kernels. */
export const SAMPLE_THREADS = 64;
/** Slices of one row in the scan. */
export const SAMPLE_SLICES = 16;
/** Bytes of the immediates: the vocabulary, and 2, the number of stages of the choice. */
export const SAMPLE_IMMEDIATE_BYTES = 8;
/** Bytes of one slice's partial: best key, best index, sum of exp, non-finite flag. */
export const SAMPLE_PARTIAL_BYTES = 16;

/**
 * Keys are u32 in the order of the f32 values; both zeros have one key. NaN and infinities count as absent.
 * A key of 0 is never made by a number: it is the key of "nothing".
 */
export const SAMPLE_KEYS_WGSL = `
fn isFiniteBits(bits: u32) -> bool { return (bits & 0x7f800000u) != 0x7f800000u; }
fn keyOf(bits: u32) -> u32 {
  if (bits == 0x80000000u) { return 0x80000000u; }
  return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}
fn valueOf(key: u32) -> f32 {
  return bitcast<f32>(select(~key, key & 0x7fffffffu, (key & 0x80000000u) != 0u));
}
`;

const KEYS = `
struct Parameters { vocabulary: u32, stages: u32 }
var<immediate> parameters: Parameters;
${SAMPLE_KEYS_WGSL}
struct Partial { key: u32, index: u32, sum: f32, nonFinite: u32 }
`;

/** Grid: x slices, y rows. Each thread walks its slice in steps, so a row's sums have one fixed order. */
export function sampleScanWgsl(): string {
  return `requires immediate_address_space;
${KEYS}
@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read_write> partials: array<Partial>;

var<workgroup> lanes: array<Partial, ${SAMPLE_THREADS}>;

@compute @workgroup_size(${SAMPLE_THREADS})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let vocabulary = parameters.vocabulary;
  let row = group.y * vocabulary;
  let slice = (vocabulary + ${SAMPLE_SLICES - 1}u) / ${SAMPLE_SLICES}u;
  let end = min((group.x + 1u) * slice, vocabulary);
  var best = Partial(0u, 0xffffffffu, 0.0, 0u);
  for (var at = group.x * slice + lane; at < end; at += ${SAMPLE_THREADS}u) {
    let bits = logits[row + at];
    if (isFiniteBits(bits)) {
      let key = keyOf(bits);
      if (key > best.key) { best.key = key; best.index = at; }
    } else {
      best.nonFinite = 1u;
    }
  }
  lanes[lane] = best;
  workgroupBarrier();
  for (var other = 0u; other < ${SAMPLE_THREADS}u; other++) {
    let candidate = lanes[other];
    if (candidate.key > best.key || (candidate.key == best.key && candidate.index < best.index)) {
      best.key = candidate.key;
      best.index = candidate.index;
    }
    best.nonFinite |= candidate.nonFinite;
  }
  workgroupBarrier();
  let top = valueOf(best.key);
  var sum = 0.0;
  for (var at = group.x * slice + lane; at < end; at += ${SAMPLE_THREADS}u) {
    let bits = logits[row + at];
    if (isFiniteBits(bits)) { sum += exp(bitcast<f32>(bits) - top); }
  }
  lanes[lane].sum = sum;
  workgroupBarrier();
  if (lane == 0u) {
    for (var other = 0u; other < ${SAMPLE_THREADS}u; other++) { best.sum += lanes[other].sum; }
    partials[group.y * ${SAMPLE_SLICES}u + group.x] = best;
  }
}
`;
}

/**
 * Integer helpers of the choice. Probabilities become 31-bit masses (mass = floor(p · 2³¹)): sums of integers do not
 * depend on their order, so the threshold search by histogram and the inverse CDF are exact and repeatable.
 */
export const SAMPLE_CHOICE_WGSL = `
struct Request { temperature: f32, topK: u32, topP: f32, seedLow: u32, seedHigh: u32, position: u32, reserved0: u32, reserved1: u32 }
struct Answer { token: u32, logprob: f32, nonFinite: u32, reserved: u32 }

/** pcg4d (Jarzynski and Olano, 2020): four random words from four counters. */
fn pcg4d(counter: vec4u) -> vec4u {
  var v = counter * 1664525u + 1013904223u;
  v.x += v.y * v.w; v.y += v.z * v.x; v.z += v.x * v.y; v.w += v.y * v.z;
  v ^= v >> vec4u(16u);
  v.x += v.y * v.w; v.y += v.z * v.x; v.z += v.x * v.y; v.w += v.y * v.z;
  return v;
}

/** floor(a · b / 2³²). */
fn multiplyHigh(a: u32, b: u32) -> u32 {
  let low = (a & 0xffffu) * (b & 0xffffu);
  let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
  let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
  return (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
}
`;

/** Workgroup state and passes over one row; every thread of the workgroup calls them together. */
const ROW_PASSES = `
var<workgroup> histogram: array<atomic<u32>, 256>;
var<workgroup> laneSums: array<f32, ${SAMPLE_THREADS}>;
var<workgroup> laneMasses: array<u32, ${SAMPLE_THREADS}>;
var<workgroup> laneTies: array<u32, ${SAMPLE_THREADS}>;
var<workgroup> found: vec2u;
var<workgroup> chosen: u32;

fn keyAt(row: u32, at: u32) -> u32 {
  let bits = logits[row + at];
  return select(0u, keyOf(bits), isFiniteBits(bits));
}

/** What is kept: keys above \`key\`, and of those equal to it the first \`ties\` by index. */
struct Threshold { key: u32, ties: u32 }
/** Weight of a key: floor(exp((value − top) / temperature) · scale); 1 for every key where \`scale\` is 0. */
struct Weighting { top: f32, inverseTemperature: f32, scale: f32 }

fn expOf(key: u32, weighting: Weighting) -> f32 {
  return exp(max((valueOf(key) - weighting.top) * weighting.inverseTemperature, -100.0));
}
fn weightOf(key: u32, weighting: Weighting) -> u32 {
  if (weighting.scale == 0.0) { return 1u; }
  return u32(expOf(key, weighting) * weighting.scale);
}

/** Radix search, a byte at a time: the highest key whose equals and betters within \`kept\` weigh at least \`wanted\`. */
fn narrow(row: u32, lane: u32, kept: Threshold, weighting: Weighting, wanted: u32) -> vec2u {
  var prefix = 0u;
  var mask = 0u;
  var remaining = wanted;
  for (var digit = 0u; digit < 4u; digit++) {
    let shift = 24u - digit * 8u;
    for (var bin = lane; bin < 256u; bin += ${SAMPLE_THREADS}u) { atomicStore(&histogram[bin], 0u); }
    workgroupBarrier();
    for (var at = lane; at < parameters.vocabulary; at += ${SAMPLE_THREADS}u) {
      let key = keyAt(row, at);
      if (key > kept.key && (key & mask) == prefix) {
        let weight = weightOf(key, weighting);
        if (weight > 0u) { atomicAdd(&histogram[(key >> shift) & 255u], weight); }
      }
    }
    if (lane == 0u && kept.ties > 0u && (kept.key & mask) == prefix) {
      atomicAdd(&histogram[(kept.key >> shift) & 255u], kept.ties * weightOf(kept.key, weighting));
    }
    workgroupBarrier();
    if (lane == 0u) {
      found = vec2u(0u, remaining);
      for (var bin = 256u; bin > 0u; bin--) {
        let weight = atomicLoad(&histogram[bin - 1u]);
        if (weight >= found.y) { found.x = bin - 1u; break; }
        found.y -= weight;
      }
    }
    workgroupBarrier();
    let step = workgroupUniformLoad(&found);
    prefix |= step.x << shift;
    mask |= 255u << shift;
    remaining = step.y;
  }
  return vec2u(prefix, remaining);
}

/** Σ exp over the keys at or above the threshold, in one fixed order. */
fn sumExp(row: u32, lane: u32, kept: Threshold, weighting: Weighting) -> f32 {
  var sum = 0.0;
  for (var at = lane; at < parameters.vocabulary; at += ${SAMPLE_THREADS}u) {
    let key = keyAt(row, at);
    if (key >= max(kept.key, 1u)) { sum += expOf(key, weighting); }
  }
  laneSums[lane] = sum;
  workgroupBarrier();
  var total = 0.0;
  for (var other = 0u; other < ${SAMPLE_THREADS}u; other++) { total += laneSums[other]; }
  return total;
}

/** Σ weight of what is kept, as f32 (exact to 24 bits; never more than the integer sum). */
fn keptMass(row: u32, lane: u32, kept: Threshold, weighting: Weighting) -> f32 {
  var mass = 0u;
  for (var at = lane; at < parameters.vocabulary; at += ${SAMPLE_THREADS}u) {
    let key = keyAt(row, at);
    if (key > kept.key) { mass += weightOf(key, weighting); }
  }
  workgroupBarrier();
  laneMasses[lane] = mass;
  workgroupBarrier();
  var total = kept.ties * weightOf(max(kept.key, 1u), weighting);
  for (var other = 0u; other < ${SAMPLE_THREADS}u; other++) { total += laneMasses[other]; }
  workgroupBarrier();
  return f32(total & 0xffffff00u);
}

/** Draws one kept token by its weight, walking the vocabulary in the order of indices; sets \`chosen\`. */
fn draw(row: u32, lane: u32, kept: Threshold, weighting: Weighting, random: u32) {
  let range = (parameters.vocabulary + ${SAMPLE_THREADS - 1}u) / ${SAMPLE_THREADS}u;
  let begin = lane * range;
  let end = min(begin + range, parameters.vocabulary);
  var above = 0u;
  var equal = 0u;
  for (var at = begin; at < end; at++) {
    let key = keyAt(row, at);
    if (key > kept.key) { above += weightOf(key, weighting); }
    if (key == kept.key && key != 0u) { equal++; }
  }
  laneMasses[lane] = above;
  laneTies[lane] = equal;
  workgroupBarrier();
  let tieWeight = weightOf(max(kept.key, 1u), weighting);
  var total = 0u;
  var before = 0u;
  var tiesLeft = kept.ties;
  var tiesBefore = 0u;
  for (var other = 0u; other < ${SAMPLE_THREADS}u; other++) {
    if (other == lane) {
      before = total;
      tiesBefore = tiesLeft;
    }
    let ties = min(tiesLeft, laneTies[other]);
    total += laneMasses[other] + ties * tieWeight;
    tiesLeft -= ties;
  }
  let place = multiplyHigh(random, total);
  let mine = above + min(tiesBefore, equal) * tieWeight;
  if (place >= before && place - before < mine) {
    var sum = before;
    for (var at = begin; at < end; at++) {
      let key = keyAt(row, at);
      var weight = 0u;
      if (key > kept.key) { weight = weightOf(key, weighting); }
      if (key == kept.key && key != 0u && tiesBefore > 0u) { weight = tieWeight; tiesBefore--; }
      sum += weight;
      if (place < sum) { chosen = at; break; }
    }
  }
  workgroupBarrier();
}
`;

/** Grid: x rows. */
export function samplePickWgsl(): string {
  return `requires immediate_address_space;
${KEYS}
${SAMPLE_CHOICE_WGSL}
@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read> partials: array<Partial>;
@group(0) @binding(2) var<storage, read> requests: array<Request>;
@group(0) @binding(3) var<storage, read_write> answers: array<Answer>;
${ROW_PASSES}
@compute @workgroup_size(${SAMPLE_THREADS})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let row = group.x * parameters.vocabulary;
  let request = requests[group.x];
  var best = partials[group.x * ${SAMPLE_SLICES}u];
  for (var slice = 1u; slice < ${SAMPLE_SLICES}u; slice++) {
    let other = partials[group.x * ${SAMPLE_SLICES}u + slice];
    if (other.key > best.key) { best.key = other.key; best.index = other.index; }
    best.nonFinite |= other.nonFinite;
  }
  let top = valueOf(max(best.key, 1u));
  var total = 0.0;
  for (var slice = 0u; slice < ${SAMPLE_SLICES}u; slice++) {
    let other = partials[group.x * ${SAMPLE_SLICES}u + slice];
    if (other.key != 0u) { total += other.sum * exp(valueOf(other.key) - top); }
  }
  // Without one finite logit there is nothing to choose: token 0, and the flag tells.
  if (lane == 0u) { chosen = select(best.index, 0u, best.key == 0u); }
  workgroupBarrier();
  if (request.temperature > 0.0 && best.key != 0u) {
    var kept = Threshold(0u, 0u);
    var weighting = Weighting(top, 1.0 / max(request.temperature, 1e-6), 0.0);
    // Top-k by count, then top-p by mass: one search in a loop, so that drivers compile it once.
    for (var stage = 0u; stage < parameters.stages; stage++) {
      let byCount = stage == 0u;
      if (!byCount) { weighting.scale = 2147483648.0 / sumExp(row, lane, kept, weighting); }
      let limitsCount = request.topK > 0u && request.topK < parameters.vocabulary;
      let limitsMass = request.topP < 1.0;
      if ((byCount && limitsCount) || (!byCount && limitsMass)) {
        var wanted = request.topK;
        if (!byCount) {
          // What is kept so far weighs 2³¹ less what rounding down took.
          wanted = max(1u, u32(ceil(max(request.topP, 0.0) * keptMass(row, lane, kept, weighting))));
        }
        let result = narrow(row, lane, kept, weighting, wanted);
        if (byCount) {
          kept = Threshold(result.x, select(result.y, 0u, result.x == 0u));
        } else {
          let weight = max(1u, weightOf(max(result.x, 1u), weighting));
          kept = Threshold(result.x, (result.y + weight - 1u) / weight);
        }
      }
    }
    draw(row, lane, kept, weighting, pcg4d(vec4u(request.seedLow, request.seedHigh, request.position, 0u)).x);
  }
  if (lane == 0u) {
    let value = bitcast<f32>(logits[row + chosen]);
    answers[group.x] = Answer(chosen, value - top - log(total), best.nonFinite, 0u);
  }
}
`;
}
