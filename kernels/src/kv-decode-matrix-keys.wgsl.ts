/** WGSL of the decode matrix kernel: queries, and logits of a group of 32 sealed tokens. */
import { each, range } from "./kv-attention-template.ts";
import { DECODE_MATRIX_THREADS, FACTOR_LINES } from "./kv-decode-matrix-dialect.ts";
import {
  fields,
  KEY_CHANNELS,
  type Plan,
  placeOf,
  QUERY_LIMIT,
  QUERY_ROUNDING,
  storePieces,
  storeSums,
  sumsAt,
  sumTogether,
  tileOf,
} from "./kv-decode-matrix-plan.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";

/** q of the lane's four channels (j, j + C/4, j + C/2, j + 3C/4 of a word of C codes), turned and rotated, as q{r}. */
export function loadQueries({ template, d, queries, metaLanes }: Plan): string {
  const { shape, heads, format } = template;
  const width = (heads + 2 * shape.kvHeads) * d;
  const gqa = heads / shape.kvHeads;
  const quarter = codesPerWord(format.keyBits) / 4;
  const scale = template.scale * Math.LOG2E * (format.rotated ? 1 / Math.sqrt(d) : 1);
  const rotate = (r: number) =>
    `q${r} = vec4f(q${r}.x + q${r}.y, q${r}.x - q${r}.y, q${r}.z + q${r}.w, q${r}.z - q${r}.w);
  q${r} = vec4f(q${r}.x + q${r}.z, q${r}.y + q${r}.w, q${r}.x - q${r}.z, q${r}.y - q${r}.w);
  ${each(Math.log2(metaLanes), (bit) => `q${r} = laneTurn(q${r}, ${1 << bit}u, lane);`, " ")}`;
  return each(
    queries,
    (r) => `  let head${r} = kvHead * ${gqa}u + min(firstQuery + ${r}u, ${gqa - 1}u);
  let from${r} = row * ${width}u + head${r} * ${d}u;
  var q${r} = vec4f(${range(4)
    .map((i) => `turnedQuery(from${r}, channel + ${i * quarter}u, position)`)
    .join(", ")}) * ${scale};
  ${format.rotated ? rotate(r) : ""}`,
  );
}

/** Registers that hold a group's K, loaded one group ahead. */
export const keyNames = ({ template, d }: Plan): readonly string[] => [
  ...range(d / codesPerWord(template.format.keyBits) / 4).map((c) => `Code${c}`),
  "Meta",
  "Partner",
  "Value",
];

/** Loads of group `g` of the split: K codes, K meta and V meta, norms. */
export function keyLoads({ template, d }: Plan, g: string): string {
  const words = d / codesPerWord(template.format.keyBits);
  const layout = kvPageLayout(template.format, template.shape);
  return `    { // Lane i knows the page of the i-th of 32 groups.
      if ((${g} & 31u) == 0u) { pageId = pageTable[slot * ${template.maxPages}u + (first + min(${g} + lane, count - 1u)) / ${template.shape.blockTokens / 32}u]; }
      let page = laneRead(pageId, ${g} & 31u, lane); nGroup = (first + ${g}) % ${template.shape.blockTokens / 32}u;
      nHead = pageStart(page, kvHead); let codes = nHead + ${layout.keyCodes / 4}u + nGroup * ${words * 8}u + lane;
      ${each(words / 4, (c) => `nCode${c} = pages[codes + ${c * 32}u];`, " ")}
      let keyMeta = nHead + ${layout.keyMeta / 4}u + nGroup * ${d / 4}u;
      nMeta = pages[keyMeta + metaLane]; nPartner = pages[keyMeta + (metaLane ^ ${codesPerWord(template.format.keyBits) / 8}u)];
      nValue = pages[nHead + ${layout.valueMeta / 4}u + nGroup * ${d / 4}u + metaLane];
      ${template.format.rotated ? "nNorm = normWord(page, nGroup * 16u + lane / 2u);" : ""} }`;
}

/** The lane's token of K codes of one round, a byte each, to workgroup memory. */
function storeKeys({ template, keyStride, codes }: Plan, round: number): string {
  const bits = template.format.keyBits;
  const words = KEY_CHANNELS / codesPerWord(bits);
  const word = (i: number) => `kCode${Math.floor((round * words + i) / 4)}.${"xyzw"[(round * words + i) % 4]}`;
  // A vec4 of bytes is one word of 2-bit codes, or two of 4-bit codes.
  const perVector = bits === 2 ? 1 : 2;
  return each(
    words / perVector,
    (v) =>
      `staged[${codes + v}u + lane * ${keyStride}u] = vec4u(${range(perVector)
        .flatMap((i) => range(8 / bits).map((j) => fields(word(v * perVector + i), bits, j)))
        .join(", ")});`,
    "\n    ",
  );
}

/**
 * q * scale of the group as two bytes a channel; sums of q * zero over the channels go to workgroup memory. Factors are
 * integers in steps of most{r} / QUERY_LIMIT; most{r} grows where a group exceeds it.
 */
function foldQueries(plan: Plan): string {
  const { queries, factors, zeros, queryStride, metaLanes } = plan;
  const mine = (text: string) =>
    metaLanes < DECODE_MATRIX_THREADS ? `select(0.0, ${text}, lane < ${metaLanes}u)` : text;
  const zeroSums = range(Math.ceil(queries / 8)).map((chunk) => {
    const values = range(Math.min(8, queries - chunk * 8)).map((i) => `part${chunk * 8 + i}`);
    const { text, size } = sumTogether(`zeroOf${chunk}`, values);
    // All lanes that hold a value write it, which is the same.
    return `${text}
    staged[${zeros + 2 * chunk}u + zeroAt + lane / ${(32 / size) * 4}u][(lane / ${32 / size}u) & 3u] = bitcast<u32>(zeroOf${chunk});`;
  });
  return `    // The lane's four channels lie in its own meta words and in those of a partner.
    let other = select(kPartner.xy, kPartner.zw, upper);
    let own = select(vec4u(kMeta.x, other.x, kMeta.y, other.y), vec4u(other.x, kMeta.z, other.y, kMeta.w), upper);
    let keyScale = scales(own); let keyZero = zeroPoints(own);
    ${each(queries, (r) => `let x${r} = q${r} * keyScale; let part${r} = ${mine(`dot(q${r}, keyZero)`)}; let y${r} = largest(abs(x${r}));`, "\n    ")}
    if (laneAny(${each(queries, (r) => `y${r} > most${r}`, " || ")}, lane)) {
      ${each(queries, (r) => `most${r} = max(most${r}, bitcast<f32>(laneMax(bitcast<u32>(y${r}), lane)) * 1.25); inverse${r} = ${QUERY_LIMIT}.0 / most${r};`, "\n      ")}
    }
    ${each(queries, (r) => storePieces(`pieces(fma(x${r}, vec4f(inverse${r}), vec4f(${QUERY_ROUNDING}.0))) ^ vec2u(0x80808080u)`, (line) => `${factors + line * queryStride}u + metaLane / 4u`, "jWord", r), "\n    ")}
    // Two places in turn: the other may still be read.
    let zeroAt = (g & 1u) * ${Math.ceil(queries / 4)}u;
    ${zeroSums.join("\n    ")}`;
}

/** Statements: the loaded group becomes the current one. */
export const takeKeys = (plan: Plan) =>
  `    let kHead = nHead; let kGroup = nGroup; ${keyNames(plan)
    .map((name) => `let k${name} = n${name};`)
    .join(" ")} ${plan.template.format.rotated ? "let kNorm = nNorm;" : ""}`;

/** What the queries' folds need from group to group. */
export const keyVariables = ({ queries }: Plan) =>
  each(queries, (r) => `var most${r} = 1.0e-30; var inverse${r} = 0.0;`, " ");

/** Logits of group `g` as logit{r} of the lane's token. The sums in workgroup memory may be overwritten after a barrier. */
export function keyGroup(plan: Plan): string {
  const { template, d, queries, tiles, keyStride, queryStride, factors, codes, zeros, dialect } = plan;
  const { rotated } = template.format;
  const perRound = KEY_CHANNELS / 32;
  return `    let following = min(g + 1u, count - 1u);
${keyLoads(plan, "following")}
    ${storeKeys(plan, 0)}
${foldQueries(plan)}
    ${each(tiles * 2, (i) => `var sum${i} = ${dialect.zero("i8")};`, " ")}
${each(
  d / KEY_CHANNELS,
  (round) => `${round === 0 ? "" : `    workgroupBarrier();\n    ${storeKeys(plan, round)}\n`}    workgroupBarrier();
${each(perRound, (depth) => {
  const k = round * perRound + depth;
  return `    ${each(tiles, (t) => dialect.loadFactors("i8", `f${t}_${k}`, { array: "staged", offset: `${factors + t * FACTOR_LINES * queryStride + 2 * k}u`, stride: queryStride }), " ")}
${each(
  2,
  (
    n,
  ) => `    ${dialect.loadCodes("i8", `c${k}_${n}`, { array: "staged", offset: `${codes + n * 16 * keyStride + 2 * depth}u`, stride: keyStride })}
    ${each(tiles, (t) => dialect.multiplyAccumulate("i8", `sum${t * 2 + n}`, `c${k}_${n}`, `f${t}_${k}`), " ")}`,
)}`;
})}`,
)}
    workgroupBarrier();
    ${each(tiles, (t) => each(2, (n) => storeSums(plan, "i8", codes, t, n, `sum${t * 2 + n}`), " "), " ")}
    workgroupBarrier();
    ${rotated ? "let norm = unpack2x16float(kNorm >> ((lane & 1u) * 16u)).x;" : ""}
    ${each(Math.ceil(queries / 4), (i) => `let zero${i} = bitcast<vec4f>(staged[${zeros + i}u + zeroAt]);`, " ")}
    ${each(tiles, (t) => `let wholes${t} = bitcast<vec4i>(${sumsAt(codes, t, 0)}) * 256 + bitcast<vec4i>(${sumsAt(codes, t, 1)});`, " ")}
    ${each(queries, (r) => `let logit${r} = fma(f32(wholes${tileOf(r)}.${placeOf(r)}), most${r} * ${1 / QUERY_LIMIT}, zero${r >> 2}.${"xyzw"[r & 3]})${rotated ? " * norm" : ""};`, "\n    ")}`;
}
