/** WGSL of `sample-pick.wgsl.ts`: how a workgroup finds the threshold of a whole row, and draws from what is kept. */

/** Needs what `sample-search.wgsl.ts` declares. */
export const SAMPLE_THRESHOLD_WGSL = `/** Falls with the value; the last bin is all that is far away. */
fn binAt(value: f32, weighting: Weighting) -> u32 {
  let perUnit = select(64.0 * weighting.inverseTemperature, 32.0, weighting.scale == 0.0);
  return u32(min((weighting.top - value) * perUnit, f32(BINS - 1u)));
}
fn binOf(key: u32, weighting: Weighting) -> u32 { return binAt(valueOf(key), weighting); }

/** Whether a logit is finite, at least \`least\`, and above the threshold. Cheap where it is not: a pass asks every logit. */
fn counts(bits: u32, least: f32, kept: Threshold) -> bool {
  let value = bitcast<f32>(bits);
  return value >= least && isFiniteBits(bits) && (kept.key == 0u || keyOf(bits) > kept.key);
}

/** A value that everything in a bin is above. */
fn leastOf(bin: u32, weighting: Weighting) -> f32 {
  let perUnit = select(64.0 * weighting.inverseTemperature, 32.0, weighting.scale == 0.0);
  let value = weighting.top - f32(bin + 1u) / perUnit;
  return select(value - 1e-5 * (abs(weighting.top) + abs(value)), -3.4028234e38, bin + 1u >= BINS);
}

/** Tokens where weights are counts; else a share of 2³¹, which is what all weigh, up to what rounding down takes. */
fn wantedOf(weighting: Weighting, share: f32, count: u32) -> u32 {
  return select(max(1u, u32(ceil(max(share, 0.0) * 2147483648.0))), count, weighting.scale == 0.0);
}

/** Whether one of four logits is at least \`least\`: most of a row is passed over by this. */
fn anyFrom(bits: vec4u, least: f32) -> bool { return any(bitcast<vec4f>(bits) >= vec4f(least)); }

/** AHEAD vectors from \`first\` on, all loads in flight at once: one workgroup alone has to hide the memory's latency. */
fn loadAhead(row: u32, first: u32, step: u32) -> array<vec4u, AHEAD> {
  var block = array<vec4u, AHEAD>();
  for (var j = 0u; j < AHEAD; j++) { block[j] = logits4(row, first + j * step); }
  return block;
}

/** A little less than a key's value. */
fn below(key: u32) -> f32 {
  let value = valueOf(max(key, 0x00800000u));
  return select(value - abs(value) * 1e-6 - 1e-30, -3.4028234e38, key <= 0x00800000u);
}

/**
 * The bin where the weights from the best logit on reach what is wanted, and what is left of that there; BINS where they
 * do not. Logits under \`least\` are passed over.
 */
fn findBin(row: u32, lane: Lane, kept: Threshold, weighting: Weighting, share: f32, count: u32, least: f32) -> vec2u {
  for (var bin = lane.index; bin < BINS; bin += THREADS) { atomicStore(&histogram[bin], 0u); }
  if (lane.index == 0u) { found = vec4u(BINS, 0u, 0u, 0u); }
  workgroupBarrier();
  for (var first = lane.index; first < VECTORS_OF_ROW; first += AHEAD * THREADS) {
    var block = loadAhead(row, first, THREADS);
    for (var j = 0u; j < AHEAD; j++) {
      let bits = block[j];
      if (!anyFrom(bits, least)) { continue; }
      for (var part = 0u; part < 4u; part++) {
        if (counts(bits[part], least, kept)) {
          let value = bitcast<f32>(bits[part]);
          let weight = weightAt(value, weighting);
          if (weight > 0u) { atomicAdd(&histogram[binAt(value, weighting)], weight); }
        }
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
  let wanted = wantedOf(weighting, share, count);
  var sum = sums.x;
  for (var i = 0u; i < each; i++) {
    let weight = atomicLoad(&histogram[lane.index * each + i]);
    if (sum < wanted && sum + weight >= wanted) { found = vec4u(lane.index * each + i, wanted - sum, 0u, 0u); }
    sum += weight;
  }
  workgroupBarrier();
  return workgroupUniformLoad(&found).xy;
}

/** Collects the keys of a bin. @returns how many there are; more than THREADS are not all collected. */
fn collectBin(row: u32, lane: Lane, bin: u32, kept: Threshold, weighting: Weighting) -> u32 {
  if (lane.index == 0u) { atomicStore(&listCount, 0u); }
  workgroupBarrier();
  let least = leastOf(bin, weighting);
  for (var first = lane.index; first < VECTORS_OF_ROW; first += AHEAD * THREADS) {
    var block = loadAhead(row, first, THREADS);
    for (var j = 0u; j < AHEAD; j++) {
      let bits = block[j];
      if (!anyFrom(bits, least)) { continue; }
      for (var part = 0u; part < 4u; part++) {
        if (counts(bits[part], least, kept) && binAt(bitcast<f32>(bits[part]), weighting) == bin) {
          let slot = atomicAdd(&listCount, 1u);
          if (slot < THREADS) { listKeys[slot] = keyOf(bits[part]); }
        }
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
fn limit(row: u32, lane: Lane, kept: Threshold, weighting: Weighting, share: f32, count: u32, least: f32) -> Threshold {
  let bin = findBin(row, lane, kept, weighting, share, count, least);
  // Fewer than wanted: all are kept.
  if (bin.x == BINS) { return kept; }
  let listed = collectBin(row, lane, bin.x, kept, weighting);
  var result = vec2u();
  if (listed <= THREADS) {
    result = narrowList(lane, listed, bin.y, kept, weighting);
  } else {
    result = narrowByDigits(row, lane, kept, weighting, wantedOf(weighting, share, count));
  }
  if (result.x == 0u) { return Threshold(0u, 0u); }
  let weight = max(1u, weightOf(result.x, weighting));
  return Threshold(result.x, (result.y + weight - 1u) / weight);
}

/** Limited rows of any kind: top-k by count, then top-p by mass, in a loop so that drivers compile it once. */
fn thresholdRange(row: u32, lane: Lane, request: Request, top: f32, inverse: f32, total: f32, random: u32) -> Draw {
  var kept = Threshold(0u, 0u);
  var weighting = Weighting(top, inverse, 0.0);
  let limitsCount = request.topK > 0u && request.topK < VOCABULARY;
  for (var stage = 0u; stage < 2u; stage++) {
    var least = -3.4028234e38;
    if (stage == 1u) {
      var sum = total;
      if (limitsCount) { sum = keptSum(row, lane, kept, weighting); }
      weighting.scale = 2147483648.0 / sum;
      // What lies below weighs less than a quarter of what may be left out, all together.
      let rest = (1.0 - request.topP) * sum / (4.0 * f32(VOCABULARY));
      least = select(-3.4028234e38, top + log(max(rest, 1e-30)) / inverse, rest > 1e-12);
    }
    if ((stage == 0u && limitsCount) || (stage == 1u && request.topP < 1.0)) {
      kept = limit(row, lane, kept, weighting, request.topP, request.topK, least);
    }
  }
  return rowRange(row, lane, kept, weighting, random);
}

/** Σ exp of what is kept, in one fixed order. */
fn keptSum(row: u32, lane: Lane, kept: Threshold, weighting: Weighting) -> f32 {
  var mine = 0.0;
  let bound = below(kept.key);
  for (var first = lane.index; first < VECTORS_OF_ROW; first += AHEAD * THREADS) {
    var block = loadAhead(row, first, THREADS);
    for (var j = 0u; j < AHEAD; j++) {
      if (!anyFrom(block[j], bound)) { continue; }
      for (var part = 0u; part < 4u; part++) {
        if (counts(block[j][part], bound, kept)) { mine += expAt(bitcast<f32>(block[j][part]), weighting); }
      }
    }
  }
  return sumAll(lane, mine) + f32(kept.ties) * expOf(max(kept.key, 1u), weighting);
}

/** The part of the row that holds the place. */
fn rowRange(row: u32, lane: Lane, kept: Threshold, weighting: Weighting, random: u32) -> Draw {
  let parts = THREADS / lane.size;
  let part = lane.index / lane.size;
  let step = lane.size;
  let each = (VECTORS_OF_ROW + parts * step - 1u) / (parts * step) * step;
  var mine = vec2u();
  let bound = below(kept.key);
  for (var i = lane.inSubgroup; i < each; i += AHEAD * step) {
    var block = loadAhead(row, part * each + i, step);
    for (var j = 0u; j < AHEAD; j++) {
      if (i + j * step >= each || !anyFrom(block[j], bound)) { continue; }
      for (var c = 0u; c < 4u; c++) {
        let value = bitcast<f32>(block[j][c]);
        if (value < bound || !isFiniteBits(block[j][c])) { continue; }
        let key = keyOf(block[j][c]);
        if (key > kept.key) { mine.x += weightAt(value, weighting); }
        if (key == kept.key) { mine.y++; }
      }
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
  return Draw(begin, min(begin + each * 4u, VOCABULARY), Threshold(kept.key, place.w), weighting, fraction);
}
`;
