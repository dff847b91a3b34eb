/** WGSL of `sample-pick.wgsl.ts`: how a workgroup draws from a slice and from a short list. */

const SHARED_STEPS = `
struct Lane { index: u32, size: u32, inSubgroup: u32 }
/** What is kept: keys above \`key\`, and of those equal to it the first \`ties\` by index. */
struct Threshold { key: u32, ties: u32 }
/** Weight of a key: floor(exp((value − top) / temperature) · scale); 1 for every key where \`scale\` is 0. */
struct Weighting { top: f32, inverseTemperature: f32, scale: f32 }

fn keyOfFinite(bits: u32) -> u32 { return select(0u, keyOf(bits), isFiniteBits(bits)); }
fn keys4(bits: vec4u) -> vec4u {
  return vec4u(keyOfFinite(bits.x), keyOfFinite(bits.y), keyOfFinite(bits.z), keyOfFinite(bits.w));
}
fn expAt(value: f32, weighting: Weighting) -> f32 {
  return exp(max((value - weighting.top) * weighting.inverseTemperature, -100.0));
}
fn expOf(key: u32, weighting: Weighting) -> f32 { return expAt(valueOf(key), weighting); }
fn weightAt(value: f32, weighting: Weighting) -> u32 {
  if (weighting.scale == 0.0) { return 1u; }
  return u32(expAt(value, weighting) * weighting.scale);
}
fn weightOf(key: u32, weighting: Weighting) -> u32 { return weightAt(valueOf(key), weighting); }

/** Sums of all threads before this one, and of all: (x, y before; x, y in all). Every thread calls it. */
fn scan(lane: Lane, value: vec2u) -> vec4u {
  let before = subgroupExclusiveAdd(value);
  workgroupBarrier();
  if (lane.inSubgroup == lane.size - 1u) { scans[lane.index / lane.size] = before + value; }
  workgroupBarrier();
  var base = vec2u();
  var total = vec2u();
  for (var other = 0u; other < THREADS / lane.size; other++) {
    if (other == lane.index / lane.size) { base = total; }
    total += scans[other];
  }
  return vec4u(base + before, total);
}

/** Sum over all threads, in one fixed order. */
fn sumAll(lane: Lane, value: f32) -> f32 {
  let sum = subgroupAdd(value);
  workgroupBarrier();
  if (lane.inSubgroup == 0u) { scans[lane.index / lane.size] = vec2u(bitcast<u32>(sum), 0u); }
  workgroupBarrier();
  var total = 0.0;
  for (var other = 0u; other < THREADS / lane.size; other++) { total += bitcast<f32>(scans[other].x); }
  return total;
}

/** Draws from a range in the order of indices, at the fraction random / 2³² of its mass; sets \`chosen\`. */
fn drawIn(row: u32, lane: Lane, draw: Draw) {
  let kept = draw.kept;
  let weighting = draw.weighting;
  let range = (draw.end - draw.begin + THREADS - 1u) / THREADS;
  let first = min(draw.begin + lane.index * range, draw.end);
  let last = min(first + range, draw.end);
  var above = 0u;
  var equal = 0u;
  for (var at = first; at < last; at++) {
    let key = keyOfFinite(logitBits(row, at));
    if (key > kept.key) { above += weightOf(key, weighting); }
    if (key == kept.key && key != 0u) { equal++; }
  }
  let sums = scan(lane, vec2u(above, equal));
  let tieWeight = weightOf(max(kept.key, 1u), weighting);
  let before = sums.x + min(sums.y, kept.ties) * tieWeight;
  let total = sums.z + min(sums.w, kept.ties) * tieWeight;
  var ties = kept.ties - min(sums.y, kept.ties);
  let mine = above + min(ties, equal) * tieWeight;
  let place = multiplyHigh(draw.random, total);
  if (place >= before && place - before < mine) {
    var sum = before;
    for (var at = first; at < last; at++) {
      let key = keyOfFinite(logitBits(row, at));
      var weight = 0u;
      if (key > kept.key) { weight = weightOf(key, weighting); }
      if (key == kept.key && key != 0u && ties > 0u) { weight = tieWeight; ties--; }
      sum += weight;
      if (place < sum) { chosen = at; break; }
    }
  }
  workgroupBarrier();
}

/** What is left to do when the range that holds the token is known. */
struct Draw { begin: u32, end: u32, kept: Threshold, weighting: Weighting, random: u32 }

/** Temperature only: the slice by its sum. */
fn sliceRange(top: f32, inverse: f32, total: f32, random: u32) -> Draw {
  let place = f32(random) * (total / 4294967296.0);
  var before = 0.0;
  var slice = 0u;
  var fraction = 0.0;
  for (var other = 0u; other < SLICES; other++) {
    let one = slicePartials[other];
    if (one.x != 0u) {
      let mass = bitcast<f32>(one.w) * exp(max((valueOf(one.x) - top) * inverse, -100.0));
      // The last slice that begins before the place.
      if (mass > 0.0 && place >= before) {
        slice = other;
        fraction = clamp((place - before) / mass, 0.0, 1.0);
      }
      before += mass;
    }
  }
  let found = slicePartials[slice];
  let weighting = Weighting(valueOf(max(found.x, 1u)), inverse, 2147483648.0 / bitcast<f32>(found.w));
  let begin = slice * SLICE;
  return Draw(begin, min(begin + SLICE, VOCABULARY), Threshold(0u, 0u), weighting, u32(fraction * 4294967040.0));
}
`;

const LIST = `
/** Limited rows whose kept tokens are surely among the few best. @returns false where they may not be. */
fn drawFromList(row: u32, lane: Lane, request: Request, top: f32, inverse: f32, total: f32, random: u32) -> bool {
  let limitsCount = request.topK > 0u && request.topK < VOCABULARY;
  let wantedRank = select(max(SUBS / 2u, 1u), request.topK, limitsCount);
  if (wantedRank > SUBS * 15u / 16u) { return false; }
  if (lane.index == 0u) {
    atomicStore(&listCount, 0u);
    found = vec4u(1u, 0u, 0u, 0u);
  }
  workgroupBarrier();
  // So many subs have a logit at or above the bound.
  for (var sub = lane.index; sub < SUBS; sub += THREADS) {
    let key = subs[row * SUBS + sub];
    var rank = 0u;
    for (var other = 0u; other < SUBS; other++) {
      let better = subs[row * SUBS + other];
      rank += select(0u, 1u, better > key || (better == key && other < sub));
    }
    if (rank + 1u == wantedRank) { found.x = max(key, 1u); }
  }
  workgroupBarrier();
  let bound = found.x;
  let least = below(bound);
  for (var sub = lane.index / lane.size; sub < SUBS; sub += THREADS / lane.size) {
    if (subs[row * SUBS + sub] < bound) { continue; }
    for (var i = lane.inSubgroup; i < SUB_VECTORS; i += AHEAD * lane.size) {
      var block = array<vec4u, AHEAD>();
      for (var j = 0u; j < AHEAD; j++) {
        block[j] = vec4u(0xff800000u);
        if (i + j * lane.size < SUB_VECTORS) { block[j] = logits4(row, subVector(sub, i + j * lane.size)); }
      }
      for (var j = 0u; j < AHEAD; j++) {
        if (!anyFrom(block[j], least)) { continue; }
        let keys = keys4(block[j]);
        for (var part = 0u; part < 4u; part++) {
          if (keys[part] >= bound) {
            let slot = atomicAdd(&listCount, 1u);
            if (slot < LIST) {
              listKeys[slot] = keys[part];
              listIndices[slot] = subVector(sub, i + j * lane.size) * 4u + part;
            }
          }
        }
      }
    }
  }
  workgroupBarrier();
  if (lane.index == 0u) { found.y = atomicLoad(&listCount); }
  let count = workgroupUniformLoad(&found).y;
  if (count > LIST || count == 0u) { return false; }
  sortList(lane, count);
  return drawSorted(lane, request, Weighting(top, inverse, 0.0), total, count, random);
}

/** By key downwards, equal ones by index. */
fn sortList(lane: Lane, count: u32) {
  if (lane.index < count) {
    let key = listKeys[lane.index];
    let index = listIndices[lane.index];
    var rank = 0u;
    for (var other = 0u; other < count; other++) {
      let better = listKeys[other];
      rank += select(0u, 1u, better > key || (better == key && listIndices[other] < index));
    }
    sortedKeys[rank] = key;
    sortedIndices[rank] = index;
  }
  workgroupBarrier();
}

fn drawSorted(lane: Lane, request: Request, unscaled: Weighting, total: f32, count: u32, random: u32) -> bool {
  let limitsCount = request.topK > 0u && request.topK < VOCABULARY;
  let most = select(count, min(count, request.topK), limitsCount);
  let mine = lane.index < most;
  let at = min(lane.index, LIST - 1u);
  var weight = 0.0;
  if (mine) { weight = expOf(sortedKeys[at], unscaled); }
  let sum = sumAll(lane, weight);
  let scale = 2147483648.0 / select(total, sum, limitsCount);
  let mass = u32(weight * scale);
  let sums = scan(lane, vec2u(mass, 0u));
  var wanted = 0xffffffffu;
  if (request.topP < 1.0) {
    // Without top-k all tokens weigh 2³¹ together, up to what rounding down takes.
    let all = select(2147483648.0, f32(sums.z & 0xffffff00u), limitsCount);
    wanted = max(1u, u32(ceil(max(request.topP, 0.0) * all)));
  }
  workgroupBarrier();
  if (lane.index == 0u) { found.z = select(0u, 1u, request.topP < 1.0 && !limitsCount && sums.z < wanted); }
  if (workgroupUniformLoad(&found).z == 1u) { return false; }
  let keeps = mine && sums.x < wanted;
  let keptMass = select(0u, mass, keeps);
  if (mine) { sortedMasses[at] = keptMass; }
  let kept = scan(lane, vec2u(keptMass, select(0u, 1u, keeps)));
  let place = multiplyHigh(random, kept.z);
  if (keeps) {
    let index = sortedIndices[at];
    var before = 0u;
    for (var other = 0u; other < kept.w; other++) {
      before += select(0u, sortedMasses[other], sortedIndices[other] < index);
    }
    if (place >= before && place - before < keptMass) { chosen = index; }
  }
  workgroupBarrier();
  return true;
}
`;

/** Needs the constants, workgroup variables and bindings that `sample-pick.wgsl.ts` writes before it. */
export const SAMPLE_SEARCH_WGSL = `${SHARED_STEPS}${LIST}`;
