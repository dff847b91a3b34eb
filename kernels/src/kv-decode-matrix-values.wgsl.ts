/** WGSL of the decode matrix kernel: softmax over a segment of groups, products with V, and the partial. */
import { each, range } from "./kv-attention-template.ts";
import { FACTOR_LINES } from "./kv-decode-matrix-dialect.ts";
import {
  CODE_STRIDE,
  FACTOR_LIMIT,
  fields,
  type Plan,
  ROUNDING,
  readSums,
  SUM_STRIDE,
  storePieces,
  storeSums,
  VALUE_TILE,
  WEIGHT_STRIDE,
} from "./kv-decode-matrix-plan.ts";
import { KV_GROUP } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";

/** Vec4 loads of a lane for a group of V codes: each is four words of 8 quads of tokens. */
const loadsOf = ({ template, d }: Plan) => d / codesPerWord(template.format.valueBits) / 4;

/** New maxima of the queries; what there is so far is scaled to them; p{r}_{j} of the segment's groups. */
export function softmax({ template, queries, parts }: Plan): string {
  const groups = template.segmentGroups;
  const most = (names: readonly string[]) => names.reduce((a, b) => `max(${a}, ${b})`);
  return `${each(
    queries,
    (
      r,
    ) => `  { let next = max(top${r}, fromOrdered(laneMax(ordered(${most(range(groups).map((j) => `logit${r}_${j}`))}), lane)));
    let keep = exp2(top${r} - next); top${r} = next;
    ${each(groups, (j) => `logit${r}_${j} = exp2(logit${r}_${j} - next);`, " ")}
    total${r} = fma(total${r}, keep, ${each(groups, (j) => `logit${r}_${j}`, " + ")}); zeros${r} *= keep; ${each(parts, (p) => `out${r}_${p} *= keep;`, " ")} }`,
  )}
  // The largest V scale of the lane's part in the segment.
  var valueTop = 1.0e-30;
  ${each(groups, (j) => `{ let m = scales(meta_${j}); valueTop = max(valueTop, max(max(m.x, m.y), max(m.z, m.w))); }`, "\n  ")}
  ${each(3, (i) => `valueTop = max(valueTop, bitcast<f32>(laneXor(bitcast<u32>(valueTop), ${parts << i}u, lane)));`, " ")}
  let valueStep = valueTop * ${1 / FACTOR_LIMIT};
  let valueInverse = ${FACTOR_LIMIT}.0 / valueTop;`;
}

/** Declares the registers of V codes and loads those of the segment's first group. */
export function firstValues(plan: Plan): string {
  return `  ${each(loadsOf(plan), (c) => `var nvCode${c} = vec4u();`, " ")}
${valueLoads(plan, "begin")}`;
}

function valueLoads(plan: Plan, g: string): string {
  const { template, d } = plan;
  const words = d / codesPerWord(template.format.valueBits);
  const layout = kvPageLayout(template.format, template.shape);
  return `    { let head = pageStart(laneRead(pageId, ${g}, lane), kvHead); let group = (first + ${g}) % ${template.shape.blockTokens / 32}u;
      let codes = head + ${layout.valueCodes / 4}u + group * ${words * 8}u + quad * ${words}u + word;
      ${each(loadsOf(plan), (c) => `nvCode${c} = pages[codes + ${c * 4}u];`, " ")} }`;
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
        places: range(8).map((i) => ({ code: i, line: (i & 1) + 8 * (i >> 1), offset: 0 })),
        tiles: [0, 1].map((half) => ({ part: c, half, offset: half * 16 * CODE_STRIDE })),
      },
    ];
  }
  return [0, 1].map((half) => ({
    places: range(8).map((i) => ({ code: 8 * half + i, line: (i & 3) + 8 * (i >> 2), offset: 0 })),
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

/** Folds p of the segment's group g with the V scales into factors: two bytes for each token, part and query. */
function foldWeights(plan: Plan): string {
  const { template, queries, parts, factors, codes, weightPart } = plan;
  const chosen = (name: (j: number) => string) =>
    range(template.segmentGroups)
      .map(name)
      .reduce((text, item, j) => (j === 0 ? item : `select(${text}, ${item}, g == ${j}u)`));
  return `    ${each(queries, (r) => `staged[${codes + r * 8}u + lane / 4u][lane & 3u] = bitcast<u32>(${chosen((j) => `logit${r}_${j}`)});`, "\n    ")}
    let metaWords = ${chosen((j) => `meta_${j}`)};
    let weight = scales(metaWords) * valueInverse; let zeroPoint = zeroPoints(metaWords);
    workgroupBarrier();
    ${each(queries, (r) => `let p${r} = bitcast<vec4f>(staged[${codes + r * 8}u + quadOf]);`, " ")}
    workgroupBarrier();
    { let at = ${factors}u + (metaLane % ${parts}u) * ${weightPart}u + quadOf / 4u;
${each(
  queries,
  (r) => `      { zeros${r} += dot(p${r}, zeroPoint); let t = fma(p${r}, weight, vec4f(${ROUNDING}.0));
        ${storePieces((line) => `at + ${line * WEIGHT_STRIDE}u`, "quadOf & 3u", r)} }`,
)} }`;
}

/** Names of the accumulators: factor tile, part, half of its channels. */
const accumulators = ({ tiles, parts }: Plan) =>
  range(tiles).flatMap((t) => range(parts).flatMap((p) => [`acc${t}_${p}_0`, `acc${t}_${p}_1`]));

/** Adds p * V of the segment's groups to zeroed accumulators. */
export function valueGroups(plan: Plan): string {
  const { template, tiles, factors, codes, dialect, weightPart } = plan;
  const rounds = range(loadsOf(plan)).flatMap((c) =>
    roundsOf(plan, c).map((round, i) => ({ ...round, c, first: i === 0 })),
  );
  const store = (c: number, { code, line }: { code: number; line: number }) => {
    const perByte = 8 / template.format.valueBits;
    return `staged[valueAt + ${line * CODE_STRIDE}u][quad & 3u] = ${fields(`b${Math.floor(code / perByte)}_${c}`, template.format.valueBits, code % perByte)};`;
  };
  const loadFactors = (part: number) =>
    each(tiles, (t) =>
      dialect.loadFactors(`w${t}_${part}`, {
        array: "staged",
        offset: `${factors + part * weightPart + t * FACTOR_LINES * WEIGHT_STRIDE}u`,
        stride: WEIGHT_STRIDE,
      }),
    );
  return `  ${accumulators(plan)
    .map((name) => `var ${name} = ${dialect.zero};`)
    .join(" ")}
  for (var g = 0u; g < segment; g++) {
    ${each(loadsOf(plan), (c) => `let vCode${c} = nvCode${c};`, " ")}
    let following = begin + min(g + 1u, segment - 1u);
${valueLoads(plan, "following")}
${foldWeights(plan)}
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
    }) => `    ${dialect.loadCodes(`v${part}_${half}`, { array: "staged", offset: `${codes + offset}u`, stride: CODE_STRIDE })}
    ${each(tiles, (t) => dialect.multiplyAccumulate(`acc${t}_${part}_${half}`, `v${part}_${half}`, `w${t}_${part}`), " ")}`,
  )
  .join("\n")}
    workgroupBarrier();`,
  )
  .join("\n")}
  }`;
}

/** The sums of a segment join the outputs out{r}_{part}: the lane's channel of each part. */
export function addOutputs(plan: Plan): string {
  const { queries, tiles, parts, partsAtOnce } = plan;
  const size = tiles * 32 * SUM_STRIDE;
  return each(parts / partsAtOnce, (turn) => {
    const some = range(partsAtOnce).map((i) => turn * partsAtOnce + i);
    return `  ${some.map((p, i) => each(tiles, (t) => each(2, (half) => storeSums(plan, i * size, t, half, `acc${t}_${p}_${half}`), " "), " ")).join(" ")}
  ${some.map((p) => `let step_${p} = bitcast<f32>(laneRead(bitcast<u32>(valueStep), ${p}u, lane));`).join(" ")}
  workgroupBarrier();
  ${some
    .map(
      (p, i) => `${readSums(plan, `all${p}_`, i * size)}
  ${each(queries, (r) => `out${r}_${p} = fma(f32(all${p}_${r}), step_${p}, out${r}_${p});`, " ")}`,
    )
    .join("\n  ")}
  workgroupBarrier();`;
  });
}

/** Sums over lanes, and the partial of each query: D outputs, maximum (log2), sum. */
export function storePartials(plan: Plan): string {
  const { template, d, queries, parts } = plan;
  const { heads, shape, format } = template;
  const gqa = heads / shape.kvHeads;
  const exact = gqa % queries === 0;
  const when = (r: number, text: string) => (exact || r === 0 ? text : `if (firstQuery + ${r}u < ${gqa}u) { ${text} }`);
  return `  let outChannel = ${laneChannel(format.valueBits)};
${each(
  queries,
  (r) => `  ${each(3, (i) => `zeros${r} += bitcast<f32>(laneXor(bitcast<u32>(zeros${r}), ${parts << i}u, lane));`, " ")}
  let at${r} = ((wid.z * ${heads}u + head${r}) * params.splits + wid.x) * ${d + 2}u;
  { let total = laneSum(total${r}, lane); if (lane == 0u) { ${when(r, `partials[at${r} + ${d}u] = top${r}; partials[at${r} + ${d + 1}u] = total;`)} } }
${each(
  parts,
  (p) => `  { let zero = bitcast<f32>(laneRead(bitcast<u32>(zeros${r}), ${p}u, lane));
    ${when(r, `partials[at${r} + ${p * KV_GROUP}u + outChannel] = out${r}_${p} + zero;`)} }`,
)}`,
)}`;
}
