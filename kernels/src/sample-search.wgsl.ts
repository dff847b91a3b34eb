/** WGSL of `sample-pick.wgsl.ts`: how a workgroup draws from a slice, from a short list, and from a whole row. */

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
fn expOf(key: u32, weighting: Weighting) -> f32 {
  return exp(max((valueOf(key) - weighting.top) * weighting.inverseTemperature, -100.0));
}
fn weightOf(key: u32, weighting: Weighting) -> u32 {
  if (weighting.scale == 0.0) { return 1u; }
  return u32(expOf(key, weighting) * weighting.scale);
}

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

/** Draws from elements begin … end − 1 in the order of indices, at the fraction random / 2³² of their mass; sets \`chosen\`. */
fn drawIn(row: u32, lane: Lane, begin: u32, end: u32, kept: Threshold, weighting: Weighting, random: u32) {
  let range = (end - begin + THREADS - 1u) / THREADS;
  let first = min(begin + lane.index * range, end);
  let last = min(first + range, end);
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
  let place = multiplyHigh(random, total);
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

/** Temperature only: the slice by its sum, then the token inside it. */
fn drawBySlices(row: u32, lane: Lane, top: f32, inverse: f32, total: f32, random: u32) {
  let place = f32(random) * (total / 4294967296.0);
  var before = 0.0;
  var slice = 0u;
  var fraction = 0.0;
  for (var other = 0u; other < SLICES; other++) {
    let one = partials[row * SLICES + other];
    if (one.x == 0u) { continue; }
    let mass = bitcast<f32>(one.w) * exp(max((valueOf(one.x) - top) * inverse, -100.0));
    // The last slice that begins before the place.
    if (mass > 0.0 && place >= before) {
      slice = other;
      fraction = clamp((place - before) / mass, 0.0, 1.0);
    }
    before += mass;
  }
  let chosenSlice = partials[row * SLICES + slice];
  let weighting = Weighting(valueOf(max(chosenSlice.x, 1u)), inverse, 2147483648.0 / bitcast<f32>(chosenSlice.w));
  let begin = slice * SLICE;
  drawIn(row, lane, begin, min(begin + SLICE, VOCABULARY), Threshold(0u, 0u), weighting, u32(fraction * 4294967040.0));
}
`;

const LIST = `
/** Limited rows whose kept tokens are surely among the few best. @returns false where they may not be. */
fn drawFromList(row: u32, lane: Lane, request: Request, top: f32, inverse: f32, total: f32, random: u32) -> bool {
  let limitsCount = request.topK > 0u && request.topK < VOCABULARY;
  let wantedRank = select(SUBS * 3u / 4u, request.topK, limitsCount);
  if (wantedRank > SUBS * 15u / 16u || wantedRank == 0u) { return false; }
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
  for (var sub = lane.index / lane.size; sub < SUBS; sub += THREADS / lane.size) {
    if (subs[row * SUBS + sub] < bound) { continue; }
    for (var i = lane.inSubgroup; i < SUB_VECTORS; i += lane.size) {
      let vector = subVector(sub, i);
      let keys = keys4(logits4(row, vector));
      for (var part = 0u; part < 4u; part++) {
        if (keys[part] >= bound) {
          let slot = atomicAdd(&listCount, 1u);
          if (slot < LIST) {
            listKeys[slot] = keys[part];
            listIndices[slot] = vector * 4u + part;
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

const THRESHOLD = `
/** Falls with the value; the last bin is all that is far away. */
fn binOf(key: u32, weighting: Weighting) -> u32 {
  let perUnit = select(64.0 * weighting.inverseTemperature, 32.0, weighting.scale == 0.0);
  return u32(min((weighting.top - valueOf(key)) * perUnit, f32(BINS - 1u)));
}

/** The bin where the weights from the best logit on reach \`wanted\`, what is left of it there, and the weight of all. */
fn findBin(row: u32, lane: Lane, kept: Threshold, weighting: Weighting, share: f32, count: u32) -> vec3u {
  for (var bin = lane.index; bin < BINS; bin += THREADS) { atomicStore(&histogram[bin], 0u); }
  if (lane.index == 0u) { found = vec4u(BINS, 0u, 0u, 0u); }
  workgroupBarrier();
  for (var vector = lane.index; vector < VECTORS_OF_ROW; vector += THREADS) {
    let keys = keys4(logits4(row, vector));
    for (var part = 0u; part < 4u; part++) {
      if (keys[part] > kept.key) {
        let weight = weightOf(keys[part], weighting);
        if (weight > 0u) { atomicAdd(&histogram[binOf(keys[part], weighting)], weight); }
      }
    }
  }
  if (lane.index == 0u && kept.ties > 0u) {
    atomicAdd(&histogram[binOf(kept.key, weighting)], kept.ties * weightOf(kept.key, weighting));
  }
  workgroupBarrier();
  var mine = 0u;
  let each = BINS / THREADS;
  for (var i = 0u; i < each; i++) { mine += atomicLoad(&histogram[lane.index * each + i]); }
  let sums = scan(lane, vec2u(mine, 0u));
  let wanted = select(count, max(1u, u32(ceil(max(share, 0.0) * f32(sums.z & 0xffffff00u)))), weighting.scale != 0.0);
  var sum = sums.x;
  for (var i = 0u; i < each; i++) {
    let weight = atomicLoad(&histogram[lane.index * each + i]);
    if (sum < wanted && sum + weight >= wanted) { found = vec4u(lane.index * each + i, wanted - sum, sums.z, 0u); }
    sum += weight;
  }
  workgroupBarrier();
  return workgroupUniformLoad(&found).xyz;
}

/** Collects the keys of a bin. @returns how many there are; more than THREADS are not all collected. */
fn collectBin(row: u32, lane: Lane, bin: u32, kept: Threshold, weighting: Weighting) -> u32 {
  if (lane.index == 0u) { atomicStore(&listCount, 0u); }
  workgroupBarrier();
  for (var vector = lane.index; vector < VECTORS_OF_ROW; vector += THREADS) {
    let keys = keys4(logits4(row, vector));
    for (var part = 0u; part < 4u; part++) {
      if (keys[part] > kept.key && binOf(keys[part], weighting) == bin) {
        let slot = atomicAdd(&listCount, 1u);
        if (slot < THREADS) { listKeys[slot] = keys[part]; }
      }
    }
  }
  workgroupBarrier();
  if (lane.index == 0u) { found.w = atomicLoad(&listCount); }
  return workgroupUniformLoad(&found).w;
}

/** The highest key of the collected ones whose equals and betters weigh at least \`wanted\`, and what is left of it there. */
fn narrowList(lane: Lane, count: u32, wanted: u32, kept: Threshold, weighting: Weighting) -> vec2u {
  if (lane.index == 0u) { found = vec4u(kept.key, wanted, 0u, 0u); }
  workgroupBarrier();
  var key = 0u;
  var above = 0u;
  var reached = 0u;
  if (lane.index < count) {
    key = listKeys[lane.index];
    for (var other = 0u; other < count; other++) {
      let weight = weightOf(listKeys[other], weighting);
      if (listKeys[other] > key) { above += weight; }
      if (listKeys[other] >= key) { reached += weight; }
    }
    // Equal keys write the same.
    if (above < wanted && reached >= wanted) { found = vec4u(key, wanted - above, 0u, 0u); }
  }
  let all = scan(lane, vec2u(select(0u, weightOf(key, weighting), lane.index < count), 0u)).z;
  // Not reached by the list: the kept ones of the tie below it.
  if (lane.index == 0u && all < wanted) { found = vec4u(kept.key, wanted - all, 0u, 0u); }
  workgroupBarrier();
  return workgroupUniformLoad(&found).xy;
}

/** The same among all keys, a byte at a time: for bins that hold more than the list. */
fn narrowByDigits(row: u32, lane: Lane, kept: Threshold, weighting: Weighting, wanted: u32) -> vec2u {
  var prefix = 0u;
  var mask = 0u;
  var remaining = wanted;
  for (var digit = 0u; digit < 4u; digit++) {
    let shift = 24u - digit * 8u;
    for (var bin = lane.index; bin < 256u; bin += THREADS) { atomicStore(&histogram[bin], 0u); }
    workgroupBarrier();
    for (var vector = lane.index; vector < VECTORS_OF_ROW; vector += THREADS) {
      let keys = keys4(logits4(row, vector));
      for (var part = 0u; part < 4u; part++) {
        let key = keys[part];
        if (key > kept.key && (key & mask) == prefix) {
          let weight = weightOf(key, weighting);
          if (weight > 0u) { atomicAdd(&histogram[(key >> shift) & 255u], weight); }
        }
      }
    }
    if (lane.index == 0u && kept.ties > 0u && (kept.key & mask) == prefix) {
      atomicAdd(&histogram[(kept.key >> shift) & 255u], kept.ties * weightOf(kept.key, weighting));
    }
    workgroupBarrier();
    if (lane.index == 0u) {
      found = vec4u(0u, remaining, 0u, 0u);
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

/** One limit: by count where \`weighting.scale\` is 0, else by the share of the mass. */
fn limit(row: u32, lane: Lane, kept: Threshold, weighting: Weighting, share: f32, count: u32) -> Threshold {
  let bin = findBin(row, lane, kept, weighting, share, count);
  // Fewer than wanted: all are kept.
  if (bin.x == BINS) { return kept; }
  let listed = collectBin(row, lane, bin.x, kept, weighting);
  var result = vec2u();
  if (listed <= THREADS) {
    result = narrowList(lane, listed, bin.y, kept, weighting);
  } else {
    let wanted = select(count, max(1u, u32(ceil(max(share, 0.0) * f32(bin.z & 0xffffff00u)))), weighting.scale != 0.0);
    result = narrowByDigits(row, lane, kept, weighting, wanted);
  }
  if (result.x == 0u) { return Threshold(0u, 0u); }
  let weight = max(1u, weightOf(result.x, weighting));
  return Threshold(result.x, (result.y + weight - 1u) / weight);
}

/** Limited rows of any kind. */
fn drawByThreshold(row: u32, lane: Lane, request: Request, top: f32, inverse: f32, total: f32, random: u32) {
  var kept = Threshold(0u, 0u);
  var weighting = Weighting(top, inverse, 0.0);
  var sum = total;
  if (request.topK > 0u && request.topK < VOCABULARY) {
    kept = limit(row, lane, kept, weighting, 1.0, request.topK);
    var mine = 0.0;
    for (var vector = lane.index; vector < VECTORS_OF_ROW; vector += THREADS) {
      let keys = keys4(logits4(row, vector));
      for (var part = 0u; part < 4u; part++) {
        if (keys[part] > kept.key) { mine += expOf(keys[part], weighting); }
      }
    }
    sum = sumAll(lane, mine) + f32(kept.ties) * expOf(max(kept.key, 1u), weighting);
  }
  weighting.scale = 2147483648.0 / sum;
  if (request.topP < 1.0) { kept = limit(row, lane, kept, weighting, request.topP, 0u); }
  drawInRow(row, lane, kept, weighting, random);
}

/** As \`drawIn\` over the whole row: first the part that holds the place, then the token inside it. */
fn drawInRow(row: u32, lane: Lane, kept: Threshold, weighting: Weighting, random: u32) {
  let parts = THREADS / lane.size;
  let part = lane.index / lane.size;
  let step = lane.size;
  let each = (VECTORS_OF_ROW + parts * step - 1u) / (parts * step) * step;
  var mine = vec2u();
  for (var i = lane.inSubgroup; i < each; i += step) {
    let keys = keys4(logits4(row, part * each + i));
    for (var c = 0u; c < 4u; c++) {
      if (keys[c] > kept.key) { mine.x += weightOf(keys[c], weighting); }
      if (keys[c] == kept.key && keys[c] != 0u) { mine.y++; }
    }
  }
  let partSum = subgroupAdd(mine);
  workgroupBarrier();
  if (lane.inSubgroup == 0u) { scans[part] = partSum; }
  workgroupBarrier();
  let tieWeight = weightOf(max(kept.key, 1u), weighting);
  var mass = 0u;
  for (var turn = 0u; turn < 2u; turn++) {
    let place = multiplyHigh(random, mass);
    var before = 0u;
    var tiesBefore = 0u;
    for (var other = 0u; other < parts; other++) {
      let ties = min(kept.ties - tiesBefore, scans[other].y);
      let here = scans[other].x + ties * tieWeight;
      if (turn == 1u && lane.index == 0u && place >= before && place - before < here) {
        found = vec4u(other, place - before, here, kept.ties - tiesBefore);
      }
      before += here;
      tiesBefore += ties;
    }
    mass = before;
  }
  workgroupBarrier();
  let place = workgroupUniformLoad(&found);
  let begin = min(place.x * each * 4u, VOCABULARY);
  // The fraction of the part's mass, such that multiplying by the mass gives the place back.
  let fraction = u32(min((f32(place.y) + 0.5) / f32(place.z) * 4294967296.0, 4294967040.0));
  drawIn(row, lane, begin, min(begin + each * 4u, VOCABULARY), Threshold(kept.key, place.w), weighting, fraction);
}
`;

/** Needs the constants, workgroup variables and bindings that `sample-pick.wgsl.ts` writes before it. */
export const SAMPLE_SEARCH_WGSL = `${SHARED_STEPS}${LIST}${THRESHOLD}`;
