/** WGSL of the decode matrix kernel: softmax, products with V, and the partial. */
import { each, range } from "./kv-attention-template.ts";
import { FACTOR_LINES } from "./kv-decode-matrix-dialect.ts";
import {
  CODE_STRIDE,
  type Plan,
  placeOf,
  SUM_STRIDE,
  storePieces,
  storeSums,
  sumsAt,
  tileOf,
  VALUE_TILE,
  WEIGHT_LIMIT,
  WEIGHT_ROUNDING,
  WEIGHT_STRIDE,
} from "./kv-decode-matrix-plan.ts";
import { KV_GROUP } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";

/** Vec4 loads of a lane for a group of V codes: each is four words of 8 quads of tokens. */
const loadsOf = ({ template, d }: Plan) => d / codesPerWord(template.format.valueBits) / 4;

/** What the queries and parts need from group to group. */
export function valueVariables(plan: Plan): string {
  const { queries, parts, dialect } = plan;
  return `${each(queries, (r) => `var ref${r} = -1.0e30; var total${r} = 0.0; var zeros${r} = 0.0; ${each(parts, (p) => `var out${r}_${p} = 0.0;`, " ")}`, "\n  ")}
  var valueBound = 0.0; var valueInverse = 0.0; ${each(parts, (p) => `var step_${p} = 0.0;`, " ")}
  ${accumulators(plan)
    .map((name) => `var ${name} = ${dialect.zero("u8")};`)
    .join(" ")}`;
}

/** Loads of V codes of the group at kHead, kGroup: vCode{load}. */
export function valueLoads(plan: Plan): string {
  const { template, d } = plan;
  const words = d / codesPerWord(template.format.valueBits);
  const layout = kvPageLayout(template.format, template.shape);
  return `    let valueCodes = kHead + ${layout.valueCodes / 4}u + kGroup * ${words * 8}u + quad * ${words}u + word;
    ${each(loadsOf(plan), (c) => `let vCode${c} = pages[valueCodes + ${c * 4}u];`, " ")}`;
}

/**
 * p is relative to a reference above the logits so far, and its folds are steps of a bound of the V scales. Where a group
 * exceeds either, the accumulators join the outputs and both grow: one in some groups of the first ones, then rarely.
 */
export function keepInRange(plan: Plan): string {
  const { queries, parts, dialect } = plan;
  return `    let valueMost = largest(scales(kValue));
    if (valueMost > valueBound || ${each(queries, (r) => `logit${r} > ref${r}`, " || ")}) { exceeded = g + 1u; }
    // Waits for all lanes: what was read of the sums may be overwritten now.
    if (workgroupUniformLoad(&exceeded) == g + 1u) {
${addOutputs(plan)}
      ${accumulators(plan)
        .map((name) => `${name} = ${dialect.zero("u8")};`)
        .join(" ")}
      ${each(
        queries,
        (
          r,
        ) => `{ let next = max(ref${r}, fromOrdered(laneMax(ordered(logit${r}), lane)) + 1.0); let keep = exp2(ref${r} - next); ref${r} = next;
        total${r} *= keep; zeros${r} *= keep; ${each(parts, (p) => `out${r}_${p} *= keep;`, " ")} }`,
        "\n      ",
      )}
      var most = valueMost;
      ${each(3, (i) => `most = max(most, bitcast<f32>(laneXor(bitcast<u32>(most), ${parts << i}u, lane)));`, " ")}
      valueBound = max(valueBound, most * 1.25); valueInverse = ${WEIGHT_LIMIT}.0 / max(valueBound, 1.0e-30);
      let valueStep = valueBound * ${1 / WEIGHT_LIMIT};
      ${each(parts, (p) => `step_${p} = bitcast<f32>(laneRead(bitcast<u32>(valueStep), ${p}u, lane));`, " ")}
    }
    ${each(queries, (r) => `let weight${r} = exp2(logit${r} - ref${r}); total${r} += weight${r};`, "\n    ")}`;
}

/** Four tokens' words of load `c` as the same byte of all four: b{byte}_{c}. */
const transposed = (
  c: number,
) => `let even${c} = (vCode${c}.xz & vec2u(0x00ff00ffu)) | ((vCode${c}.yw << vec2u(8u)) & vec2u(0xff00ff00u));
    let odd${c} = ((vCode${c}.xz >> vec2u(8u)) & vec2u(0x00ff00ffu)) | (vCode${c}.yw & vec2u(0xff00ff00u));
    let b0_${c} = (even${c}.x & 0xffffu) | (even${c}.y << 16u); let b2_${c} = (even${c}.x >> 16u) | (even${c}.y & 0xffff0000u);
    let b1_${c} = (odd${c}.x & 0xffffu) | (odd${c}.y << 16u); let b3_${c} = (odd${c}.x >> 16u) | (odd${c}.y & 0xffff0000u);`;

/**
 * Where codes of V lie in a round of 32 lines (two tiles), so that the lanes of a store meet different banks. 2 bits: a
 * load is two words of each of two parts; a round takes half of their channels, a tile is a part. 4 bits: a load is a
 * part, and a round all of it.
 */
function roundsOf(plan: Plan, c: number) {
  if (plan.template.format.valueBits === 4) {
    return [
      {
        places: range(8).map((i) => ({ code: i, line: (i & 1) + 8 * (i >> 1) })),
        tiles: [0, 1].map((half) => ({ part: c, half, offset: half * 16 * CODE_STRIDE })),
      },
    ];
  }
  return [0, 1].map((half) => ({
    places: range(8).map((i) => ({ code: 8 * half + i, line: (i & 3) + 8 * (i >> 2) })),
    tiles: [0, 1].map((i) => ({ part: 2 * c + i, half, offset: i * VALUE_TILE })),
  }));
}

/** Text: the vec4 where the lane's first code of a round lies. */
export const valueLanePlace = (bits: number) =>
  bits === 4
    ? `(2u * (word >> 1u) + 4u * (word & 1u)) * ${CODE_STRIDE}u`
    : `(word >> 1u) * ${VALUE_TILE}u + (word & 1u) * ${4 * CODE_STRIDE}u`;

/** Text: channel of its part that the lane's sum belongs to: the lane is a line of both tiles. */
const laneChannel = (bits: number) =>
  bits === 4
    ? "(((lane >> 2u) & 1u) + 2u * ((lane >> 1u) & 1u)) * 8u + (lane & 1u) + 2u * (lane >> 3u)"
    : "((lane >> 2u) & 1u) * 16u + (lane >> 4u) * 8u + (lane & 3u) + 4u * ((lane >> 3u) & 1u)";

/** Folds p of the group with the V scales into factors: two bytes for each token, part and query. */
function foldWeights(plan: Plan): string {
  const { queries, parts, factors, codes, weightPart } = plan;
  return `    ${each(queries, (r) => `staged[${codes + r * 8}u + lane / 4u][lane & 3u] = bitcast<u32>(weight${r});`, "\n    ")}
    let valueScale = scales(kValue) * valueInverse; let zeroPoint = zeroPoints(kValue);
    workgroupBarrier();
    ${each(queries, (r) => `let p${r} = bitcast<vec4f>(staged[${codes + r * 8}u + quadOf]);`, " ")}
    workgroupBarrier();
    { let at = ${factors}u + (metaLane % ${parts}u) * ${weightPart}u + quadOf / 4u;
      ${each(
        queries,
        (r) => `zeros${r} += dot(p${r}, zeroPoint);
      ${storePieces(`pieces(fma(p${r}, valueScale, vec4f(${WEIGHT_ROUNDING}.0)))`, (line) => `at + ${line * WEIGHT_STRIDE}u`, "quadOf & 3u", r)}`,
        "\n      ",
      )} }`;
}

/** Names of the accumulators: factor tile, part, half of its channels. */
const accumulators = ({ tiles, parts }: Plan) =>
  range(tiles).flatMap((t) => range(parts).flatMap((p) => [`acc${t}_${p}_0`, `acc${t}_${p}_1`]));

/** Adds p * V of the group to the accumulators. */
export function valueGroup(plan: Plan): string {
  const { template, tiles, factors, codes, dialect, weightPart } = plan;
  const bits = template.format.valueBits;
  const rounds = range(loadsOf(plan)).flatMap((c) =>
    roundsOf(plan, c).map((round, i) => ({ ...round, c, first: i === 0 })),
  );
  const store = (c: number, { code, line }: { code: number; line: number }) => {
    const perByte = 8 / bits;
    const mask = (((1 << bits) - 1) << (bits * (code % perByte))) * 0x01010101;
    return `staged[valueAt + ${line * CODE_STRIDE}u][quad & 3u] = b${Math.floor(code / perByte)}_${c} & 0x${mask.toString(16)}u;`;
  };
  const loadFactors = (part: number) =>
    each(tiles, (t) =>
      dialect.loadFactors("u8", `w${t}_${part}`, {
        array: "staged",
        offset: `${factors + part * weightPart + t * FACTOR_LINES * WEIGHT_STRIDE}u`,
        stride: WEIGHT_STRIDE,
      }),
    );
  return `${foldWeights(plan)}
${rounds
  .map(
    ({ places, tiles: codeTiles, c, first }) => `    ${first ? transposed(c) : ""}
    ${places.map((place) => store(c, place)).join("\n    ")}
    workgroupBarrier();
    ${first ? [...new Set(codeTiles.map(({ part }) => part))].map(loadFactors).join(" ") : ""}
${codeTiles
  .map(
    ({
      part,
      half,
      offset,
    }) => `    ${dialect.loadCodes("u8", `v${part}_${half}`, { array: "staged", offset: `${codes + offset}u`, stride: CODE_STRIDE })}
    ${each(tiles, (t) => dialect.multiplyAccumulate("u8", `acc${t}_${part}_${half}`, `v${part}_${half}`, `w${t}_${part}`), " ")}`,
  )
  .join("\n")}
    workgroupBarrier();`,
  )
  .join("\n")}`;
}

/** The accumulators join the outputs out{r}_{part}: the lane's channel of each part. Codes keep their place in a byte. */
export function addOutputs(plan: Plan): string {
  const { queries, tiles, parts, partsAtOnce } = plan;
  const size = tiles * 32 * SUM_STRIDE;
  return each(parts / partsAtOnce, (turn) => {
    const some = range(partsAtOnce).map((i) => turn * partsAtOnce + i);
    return `      ${some.map((p, i) => each(tiles, (t) => each(2, (half) => storeSums(plan, "u8", i * size, t, half, `acc${t}_${p}_${half}`), " "), " ")).join(" ")}
      workgroupBarrier();
      ${some
        .map(
          (p, i) => `{ let factor = step_${p} * placeFactor;
      ${each(tiles, (t) => `let sums${t} = fma(vec4f(${sumsAt(i * size, t, 0)}), vec4f(256.0), vec4f(${sumsAt(i * size, t, 1)}));`, " ")}
      ${each(queries, (r) => `out${r}_${p} = fma(sums${tileOf(r)}.${placeOf(r)}, factor, out${r}_${p});`, " ")} }`,
        )
        .join("\n      ")}
      workgroupBarrier();`;
  });
}

/** Text: one over the place of the lane's channel in its byte, a power of two. */
export const placeFactor = (bits: number) => `bitcast<f32>((127u - ${bits}u * (lane & ${8 / bits - 1}u)) << 23u)`;

/** Sums over lanes, and the partial of each query: D outputs, maximum (log2), sum. */
export function storePartials(plan: Plan): string {
  const { template, d, queries, parts } = plan;
  const { heads, shape } = template;
  const gqa = heads / shape.kvHeads;
  const exact = gqa % queries === 0;
  const when = (r: number, text: string) => (exact || r === 0 ? text : `if (firstQuery + ${r}u < ${gqa}u) { ${text} }`);
  return `  let outChannel = ${laneChannel(template.format.valueBits)};
${each(
  queries,
  (r) => `  ${each(3, (i) => `zeros${r} += bitcast<f32>(laneXor(bitcast<u32>(zeros${r}), ${parts << i}u, lane));`, " ")}
  let at${r} = ((wid.z * ${heads}u + head${r}) * params.splits + wid.x) * ${d + 2}u;
  { let total = laneSum(total${r}, lane); if (lane == 0u) { ${when(r, `partials[at${r} + ${d}u] = ref${r}; partials[at${r} + ${d + 1}u] = total;`)} } }
${each(
  parts,
  (p) => `  { let zero = bitcast<f32>(laneRead(bitcast<u32>(zeros${r}), ${p}u, lane));
    ${when(r, `partials[at${r} + ${p * KV_GROUP}u + outChannel] = out${r}_${p} + zero;`)} }`,
)}`,
)}`;
}
