/**
 * WGSL of the decode split on 8-bit matrices, for several query heads a KV head. One workgroup of 32 threads takes one
 * (row, KV head, split); its queries are rows of the left matrices, the unpacked codes (bytes) the right ones.
 *
 * logit = sum (q scale) code + sum q zero; output = sum (p scale) code + sum p zero. The folded factors (q scale, p scale)
 * are integers of 16 bits in steps of their largest value, cut into two signed bytes: two rows of the matrix (row r high,
 * row r + 8 low). Products of integers are exact, so only that rounding (2^-16 of the largest factor) is lost.
 *
 * Two passes over the split: all logits first, then their maximum, then p and the output.
 */

import { each, range } from "./kv-attention-template.ts";
import {
  DECODE_MATRIX_THREADS,
  type DecodeMatrixDialect,
  decodeMatrixDialect,
  type FactorSide,
} from "./kv-decode-matrix-dialect.ts";
import { DECODE_SPLIT_STEP } from "./kv-decode-packed.wgsl.ts";
import { KV_GROUP, type KvFormat, type KvShape } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";
import { type QueryRope, queryRopeWgsl } from "./kv-query-rope.wgsl.ts";

export interface DecodeMatrixTemplate extends QueryRope {
  readonly format: KvFormat;
  readonly shape: KvShape;
  /** Query heads: a multiple of shape.kvHeads. */
  readonly heads: number;
  /** Query heads of one workgroup, at most heads / kvHeads. */
  readonly queries: number;
  readonly maxPages: number;
  /** Tokens whose logits are held at once: softmax and output go from segment to segment; a multiple of 32. */
  readonly segmentTokens: number;
  /** Factor of the logits. */
  readonly scale: number;
  readonly dialect: "device" | "emulated";
  readonly side: FactorSide;
}

/** Sealed tokens of one split that suit the kernel: fixed positions of the sequence. */
export const DECODE_MATRIX_SPLIT_TOKENS = 256;

/** Query heads a KV head from which on matrices are faster than packed multiply-adds. */
const LEAST_QUERIES = 3;

/** Whether the kernel can hold the format and shape, and is worth it. */
export function decodeMatrixSupports(format: KvFormat, shape: KvShape, heads: number): boolean {
  return (
    format.keyBits < 16 &&
    format.valueBits < 16 &&
    (shape.headDim === 64 || shape.headDim === 128) &&
    heads / shape.kvHeads >= LEAST_QUERIES
  );
}

/** Workgroups in y: query tiles of all KV heads. */
export function decodeMatrixTiles({ heads, shape, queries }: DecodeMatrixTemplate): number {
  return shape.kvHeads * Math.ceil(heads / shape.kvHeads / queries);
}

/** Largest folded factor as an integer: leaves room for the borrow of signed low bytes. */
const FACTOR_LIMIT = 32000;
/** 1.5 * 2^23 rounds to an integer in the low mantissa bits; 0x8080 makes both bytes non-negative. */
const ROUNDING = 12582912 + 0x8080;

interface Plan {
  readonly dialect: DecodeMatrixDialect;
  readonly template: DecodeMatrixTemplate;
  readonly d: number;
  readonly queries: number;
  /** Factor operands: each holds half as many queries as it has lines. */
  readonly tiles: number;
  readonly factors: number;
  readonly parts: number;
  /** Threads that each own four words of meta. */
  readonly metaLanes: number;
  /** Vec4s of one row of K codes or of folded queries, padded against bank conflicts. */
  readonly keyStride: number;
  /** Offsets into the staged array, in vec4s. */
  readonly codes: number;
  readonly left: number;
  readonly sums: number;
  readonly zeros: number;
  readonly logits: number;
  readonly stagedSize: number;
  readonly groups: number;
}

/** Vec4s of a row of 32 tokens (bytes) with padding. */
const TOKEN_STRIDE = 3;
/** Vec4s from the V codes of one part to the next: 32 channels and two of padding, so that parts meet other banks. */
const PART_STRIDE = 32 * TOKEN_STRIDE + 2;
/** Vec4s of a row of sums: 32 codes, padded, where factors are rows; 8 factors where codes are. */
const SUM_STRIDE = { wide: 10, narrow: 2 };

function planOf(template: DecodeMatrixTemplate): Plan {
  const { shape, queries, segmentTokens, side } = template;
  const d = shape.headDim;
  const dialect = decodeMatrixDialect(template.dialect, side);
  const { factors } = dialect;
  const tiles = Math.ceil(queries / (factors / 2));
  const parts = d / KV_GROUP;
  const keyStride = d / 16 + 1;
  const groups = segmentTokens / KV_GROUP;
  const codes = 0;
  // Sums of keys lie behind the key codes, where value codes may lie later.
  const sums = codes + 32 * keyStride;
  const sumSize = tiles * (side === "wide" ? 16 * SUM_STRIDE.wide : 32 * SUM_STRIDE.narrow);
  const left = Math.max(sums + sumSize, parts * PART_STRIDE);
  const zeros = left + Math.max(factors * tiles * keyStride, parts * leftPartStride(tiles * factors));
  const logits = zeros + 2 * Math.ceil(queries / 4);
  const stagedSize = logits + queries * groups * 8;
  return {
    dialect,
    template,
    d,
    queries,
    tiles,
    factors,
    parts,
    metaLanes: d / 4,
    keyStride,
    codes,
    left,
    sums,
    zeros,
    logits,
    stagedSize,
    groups,
  };
}

const leftPartStride = (lines: number) => lines * TOKEN_STRIDE + 2;

/** Line of a query's high byte in the factor operands; the low byte's is half an operand further. */
const rowOf = ({ factors }: Plan, query: number) =>
  Math.floor(query / (factors / 2)) * factors + (query % (factors / 2));

/** Statement: the sums of the lane's code (and all queries) as i32 whole{r}. */
function readSums(plan: Plan): string {
  const { template, queries, factors, tiles, sums } = plan;
  if (template.side === "wide") {
    const at = (row: number) => `bitcast<i32>(staged[${sums + row * SUM_STRIDE.wide}u + lane / 4u][lane & 3u])`;
    return each(
      queries,
      (r) => `    let whole${r} = ${at(rowOf(plan, r))} * 256 + ${at(rowOf(plan, r) + factors / 2)};`,
    );
  }
  const at = (t: number, half: number) =>
    `bitcast<vec4i>(staged[${sums + t * 32 * SUM_STRIDE.narrow + half}u + lane * ${SUM_STRIDE.narrow}u])`;
  return `${each(tiles, (t) => `    let wholes${t} = ${at(t, 0)} * 256 + ${at(t, 1)};`)}
    ${each(queries, (r) => `let whole${r} = wholes${r >> 2}.${"xyzw"[r & 3]};`, " ")}`;
}

/** Where the sums of code tile `n` (of two) of factor tile `t` go. */
function storeSums({ template, dialect, sums }: Plan, t: number, n: number, sum: string): string {
  return template.side === "wide"
    ? dialect.store("staged", `${sums + t * 16 * SUM_STRIDE.wide + n * 4}u`, SUM_STRIDE.wide, sum)
    : dialect.store("staged", `${sums + (t * 2 + n) * 16 * SUM_STRIDE.narrow}u`, SUM_STRIDE.narrow, sum);
}

/**
 * Sums up to 8 values over all lanes: halves of the lanes go on with halves of the values. Afterwards lane
 * i * (32 / size) and those behind it hold value i in `name`; returns the text and that size, a power of two.
 */
function sumTogether(name: string, values: readonly string[]): { readonly text: string; readonly size: number } {
  const size = 2 ** Math.ceil(Math.log2(values.length));
  const lines: string[] = [];
  let list: readonly string[] = values;
  let mask = 16;
  for (let count = size; count > 1; count /= 2) {
    const half = count / 2;
    list = range(half).map((i) => {
      const [a, b] = [list[i] ?? "0.0", list[i + half] ?? "0.0"];
      const next = `${name}m${mask}i${i}`;
      lines.push(
        `let ${next} = select(${a}, ${b}, (lane & ${mask}u) != 0u) + bitcast<f32>(laneXor(bitcast<u32>(select(${b}, ${a}, (lane & ${mask}u) != 0u)), ${mask}u, lane));`,
      );
      return next;
    });
    mask /= 2;
  }
  lines.push(`var ${name} = ${list[0]};`);
  for (; mask >= 1; mask /= 2) {
    lines.push(`${name} += bitcast<f32>(laneXor(bitcast<u32>(${name}), ${mask}u, lane));`);
  }
  return { text: lines.join("\n    "), size };
}

const HELPERS = `
// Two words of 16-bit integers, each in four bytes of a piece: high bytes and low bytes of a (x), c (y), b (z), d (w) in order x y z w.
fn pieces(t: vec4f) -> vec2u {
  let u = bitcast<vec4u>(t);
  let even = (u.x & 0xffffu) | (u.z << 16u);
  let odd = (u.y & 0xffffu) | (u.w << 16u);
  let high = ((even >> 8u) & 0x00ff00ffu) | (odd & 0xff00ff00u);
  let low = (even & 0x00ff00ffu) | ((odd << 8u) & 0xff00ff00u);
  return vec2u(high, low) ^ vec2u(0x80808080u);
}
fn scales(words: vec4u) -> mat4x2f { return mat4x2f(unpack2x16float(words.x), unpack2x16float(words.y), unpack2x16float(words.z), unpack2x16float(words.w)); }`;

/** Stores the two bytes of each of a query's four factors. */
function storePieces(plan: Plan, name: string, at: (row: number) => string, component: string, query: number): string {
  const row = rowOf(plan, query);
  return `{ let w = pieces(${name}); staged[${at(row)}][${component}] = w.x; staged[${at(row + plan.factors / 2)}][${component}] = w.y; }`;
}

/** q of the lane's four channels (j, j + C/4, j + C/2, j + 3C/4 of word w) as vec4f q{r}. */
function loadQueries({ template, d, queries, metaLanes }: Plan): string {
  const { shape, heads, format } = template;
  const width = (heads + 2 * shape.kvHeads) * d;
  const gqa = heads / shape.kvHeads;
  const perWord = codesPerWord(format.keyBits);
  const quarter = perWord / 4;
  const scale = template.scale * Math.LOG2E * (format.rotated ? 1 / Math.sqrt(d) : 1);
  const step = (r: number, mask: number) => `q${r} = laneTurn(q${r}, ${mask}u, lane);`;
  const rotate = (r: number) =>
    `q${r} = vec4f(q${r}.x + q${r}.y, q${r}.x - q${r}.y, q${r}.z + q${r}.w, q${r}.z - q${r}.w);
  q${r} = vec4f(q${r}.x + q${r}.z, q${r}.y + q${r}.w, q${r}.x - q${r}.z, q${r}.y - q${r}.w);
  ${range(Math.log2(metaLanes))
    .map((bit) => step(r, 1 << bit))
    .join(" ")}`;
  return `${each(
    queries,
    (r) => `  let head${r} = kvHead * ${gqa}u + min(firstQuery + ${r}u, ${gqa - 1}u);
  let from${r} = row * ${width}u + head${r} * ${d}u;
  var q${r} = vec4f(${range(4)
    .map((i) => `turnedQuery(from${r}, channel + ${i * quarter}u, position)`)
    .join(", ")}) * ${scale};
  ${format.rotated ? rotate(r) : ""}`,
  )}`;
}

/** Bytes of a code word: code j of each of its four bytes, shifted down. */
const fields = (word: string, bits: number, j: number) =>
  `(${j === 0 ? word : `(${word} >> ${bits * j}u)`} & ${bits === 2 ? "0x03030303u" : "0x0f0f0f0fu"})`;

/** Loads of group `g` into names with a prefix. */
function keyLoads({ template, d }: Plan, prefix: string, g: string): string {
  const words = d / codesPerWord(template.format.keyBits);
  const layout = kvPageLayout(template.format, template.shape);
  return `    { let page = pageStart(laneRead(pageId, ${g}, lane), kvHead); let group = (first + ${g}) % ${template.shape.blockTokens / KV_GROUP}u;
      let codes = page + ${layout.keyCodes / 4}u + group * ${words * 8}u + lane;
      ${each(words / 4, (c) => `${prefix}Code${c} = pages[codes + ${c * 32}u];`, " ")}
      ${prefix}Meta = pages[page + ${layout.keyMeta / 4}u + group * ${d / 4}u + metaLane];
      ${prefix}Value = pages[page + ${layout.valueMeta / 4}u + group * ${d / 4}u + metaLane];
      ${template.format.rotated ? `${prefix}Norm = normWord(laneRead(pageId, ${g}, lane), group * 16u + lane / 2u);` : ""} }`;
}

/** The lane's token of K codes, a byte each, to shared memory. */
function storeKeys({ template, d, keyStride, codes }: Plan): string {
  const bits = template.format.keyBits;
  const words = d / codesPerWord(bits);
  const store = (index: number, text: string) => `staged[${codes + index}u + lane * ${keyStride}u] = ${text};`;
  return range(words / 4)
    .map((c) =>
      range(4)
        .map((i) => {
          const word = `kCode${c}.${"xyzw"[i]}`;
          if (bits === 2)
            return store(
              c * 4 + i,
              `vec4u(${range(4)
                .map((j) => fields(word, 2, j))
                .join(", ")})`,
            );
          if (i % 2 === 1) return "";
          const next = `kCode${c}.${"xyzw"[i + 1]}`;
          return store(
            (c * 4 + i) / 2,
            `vec4u(${[word, next].flatMap((name) => [fields(name, 4, 0), fields(name, 4, 1)]).join(", ")})`,
          );
        })
        .join("\n    "),
    )
    .join("\n    ");
}

/** Loads of the first group of keys, before the first segment; later ones are loaded one group ahead. */
function firstKeys(plan: Plan): string {
  const { format } = plan.template;
  const names = keyNames(plan);
  return `  ${names.map((name) => `var n${name} = vec4u();`).join(" ")} ${format.rotated ? "var nNorm = 0u;" : ""}
${keyLoads(plan, "n", "0u")}`;
}

const keyNames = ({ template, d }: Plan) => [
  ...range(d / codesPerWord(template.format.keyBits) / 4).map((c) => `Code${c}`),
  "Meta",
  "Value",
];

function keyPhase(plan: Plan): string {
  const { template, d, queries, tiles, factors, keyStride, left, codes, zeros, logits, groups, metaLanes, dialect } =
    plan;
  const { format } = template;
  const partner = codesPerWord(format.keyBits) / 8;
  const names = keyNames(plan);
  const zeroSums = range(Math.ceil(queries / 8)).map((chunk) => {
    const values = range(Math.min(8, queries - chunk * 8)).map((i) => `part${chunk * 8 + i}`);
    const { text, size } = sumTogether(`zeroOf${chunk}`, values);
    const run = 32 / size;
    return `${text}
    if ((lane & ${run - 1}u) == 0u) { let i = lane / ${run}u; staged[${zeros + 2 * chunk}u + zeroAt + i / 4u][i & 3u] = bitcast<u32>(zeroOf${chunk}); }`;
  });
  const zeroVectors = Math.ceil(queries / 4);
  const mine =
    metaLanes < DECODE_MATRIX_THREADS
      ? (text: string) => `select(0.0, ${text}, lane < ${metaLanes}u)`
      : (text: string) => text;
  return `  for (var g = 0u; g < segment; g++) {
    ${names.map((name) => `let k${name} = n${name};`).join(" ")} ${format.rotated ? "let kNorm = nNorm;" : ""}
    let following = min(begin + g + 1u, count - 1u);
${keyLoads(plan, "n", "following")}
    ${storeKeys(plan)}
    // The lane's four channels lie in its own meta words and in those of a partner.
    let sent = select(kMeta.zw, kMeta.xy, upper);
    let other = vec2u(laneXor(sent.x, ${partner}u, lane), laneXor(sent.y, ${partner}u, lane));
    let sz = scales(select(vec4u(kMeta.x, other.x, kMeta.y, other.y), vec4u(other.x, kMeta.z, other.y, kMeta.w), upper));
    let keyScale = vec4f(sz[0].x, sz[1].x, sz[2].x, sz[3].x);
    let keyZero = vec4f(sz[0].y, sz[1].y, sz[2].y, sz[3].y);
    { let m = scales(kValue); valueTop = max(valueTop, max(max(m[0].x, m[1].x), max(m[2].x, m[3].x))); }
${each(
  queries,
  (r) => `    let x${r} = q${r} * keyScale; let part${r} = ${mine(`dot(q${r}, keyZero)`)};
    let y${r} = abs(x${r}); let top${r}g = bitcast<f32>(laneMax(bitcast<u32>(max(max(y${r}.x, y${r}.y), max(y${r}.z, y${r}.w))), lane));
    let step${r} = max(top${r}g, 1.0e-30) * ${1 / FACTOR_LIMIT};
    { let inverse = ${FACTOR_LIMIT}.0 / max(top${r}g, 1.0e-30);
      let t = fma(x${r}, vec4f(inverse), vec4f(${ROUNDING}.0));
      ${storePieces(plan, "t", (row) => `${left + row * keyStride}u + metaLane / 4u`, "jWord", r)} }`,
)}
    // Two places in turn: the other may still be read.
    let zeroAt = (g & 1u) * ${zeroVectors}u;
    ${zeroSums.join("\n    ")}
    workgroupBarrier();
    { ${each(tiles * 2, (i) => `var sum${i} = ${dialect.zero};`, " ")}
${each(
  d / 32,
  (
    k,
  ) => `      { ${each(tiles, (t) => dialect.loadFactors(`f${t}_${k}`, { array: "staged", offset: `${left + t * factors * keyStride + 2 * k}u`, stride: keyStride }), " ")}
${each(
  2,
  (
    n,
  ) => `        ${dialect.loadCodes(`c${k}_${n}`, { array: "staged", offset: `${codes + n * 16 * keyStride + 2 * k}u`, stride: keyStride })}
        ${each(tiles, (t) => dialect.multiplyAccumulate(`sum${t * 2 + n}`, `c${k}_${n}`, `f${t}_${k}`), " ")}`,
)} }`,
)}
      ${each(tiles, (t) => each(2, (n) => storeSums(plan, t, n, `sum${t * 2 + n}`), " "), " ")} }
    workgroupBarrier();
    ${format.rotated ? "let norm = unpack2x16float(kNorm >> ((lane & 1u) * 16u)).x;" : ""}
    ${each(zeroVectors, (i) => `let zero${i} = bitcast<vec4f>(staged[${zeros + i}u + zeroAt]);`, " ")}
${readSums(plan)}
${each(
  queries,
  (
    r,
  ) => `    { let logit = fma(f32(whole${r}), step${r}, zero${r >> 2}.${"xyzw"[r & 3]})${format.rotated ? " * norm" : ""};
      best${r} = max(best${r}, logit);
      staged[${logits + r * groups * 8}u + g * 8u + lane / 4u][lane & 3u] = bitcast<u32>(logit); }`,
)}
  }
  workgroupBarrier();`;
}

/** New maxima of the queries; what there is so far is scaled to them; every logit becomes p. */
function softmax({ queries, logits, groups, parts }: Plan): string {
  return `${each(
    queries,
    (r) => `  { let next = max(top${r}, fromOrdered(laneMax(ordered(best${r}), lane)));
    let keep = exp2(top${r} - next);
    top${r} = next; total${r} *= keep; zeros${r} *= keep; ${each(parts, (p) => `out${r}_${p} *= keep;`, " ")}
    for (var i = lane; i < segment * 8u; i += 32u) {
      let p = exp2(bitcast<vec4f>(staged[${logits + r * groups * 8}u + i]) - vec4f(next));
      total${r} += (p.x + p.y) + (p.z + p.w);
      staged[${logits + r * groups * 8}u + i] = bitcast<vec4u>(p);
    } }`,
  )}
  // The largest V scale of the lane's part.
  ${range(3)
    .map((i) => `valueTop = max(valueTop, bitcast<f32>(laneXor(bitcast<u32>(valueTop), ${parts << i}u, lane)));`)
    .join(" ")}
  let valueStep = max(valueTop, 1.0e-30) * ${1 / FACTOR_LIMIT};
  let valueInverse = ${FACTOR_LIMIT}.0 / max(valueTop, 1.0e-30);
  workgroupBarrier();`;
}

function valueLoads({ template, d }: Plan, prefix: string, g: string): string {
  const words = d / codesPerWord(template.format.valueBits);
  const layout = kvPageLayout(template.format, template.shape);
  const quads = words / 4;
  return `    { let page = pageStart(laneRead(pageId, ${g}, lane), kvHead); let group = (first + ${g}) % ${template.shape.blockTokens / KV_GROUP}u;
      let codes = page + ${layout.valueCodes / 4}u + group * ${words * 8}u + (lane / ${words}u) * ${words * quads}u + lane % ${words}u;
      ${each(quads, (c) => `${prefix}Code${c} = pages[codes + ${c * words}u];`, " ")}
      ${prefix}Meta = pages[page + ${layout.valueMeta / 4}u + group * ${d / 4}u + metaLane]; }`;
}

/** Four tokens' words of 16 or 8 channels become, for each channel, a word of the four tokens' bytes. */
function storeValues({ template, d, codes }: Plan): string {
  const bits = template.format.valueBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const quads = words / 4;
  const perPart = KV_GROUP / perWord;
  const perByte = 8 / bits;
  const unpack = (
    c: number,
  ) => `let even${c} = (vCode${c}.xz & vec2u(0x00ff00ffu)) | ((vCode${c}.yw << vec2u(8u)) & vec2u(0xff00ff00u));
    let odd${c} = ((vCode${c}.xz >> vec2u(8u)) & vec2u(0x00ff00ffu)) | (vCode${c}.yw & vec2u(0xff00ff00u));
    let b0_${c} = (even${c}.x & 0xffffu) | (even${c}.y << 16u); let b2_${c} = (even${c}.x >> 16u) | (even${c}.y & 0xffff0000u);
    let b1_${c} = (odd${c}.x & 0xffffu) | (odd${c}.y << 16u); let b3_${c} = (odd${c}.x >> 16u) | (odd${c}.y & 0xffff0000u);`;
  const channelWord = (c: number, i: number) => fields(`b${Math.floor(i / perByte)}_${c}`, bits, i % perByte);
  const row = (i: number) => `valueAt + ${i * perPart * TOKEN_STRIDE}u`;
  const stores =
    quads === 4
      ? each(
          perWord,
          (i) =>
            `staged[${row(i)}] = vec4u(${range(4)
              .map((c) => channelWord(c, i))
              .join(", ")});`,
          "\n    ",
        )
      : each(
          perWord,
          (i) => each(quads, (c) => `staged[${row(i)}][valueComponent + ${c}u] = ${channelWord(c, i)};`, " "),
          "\n    ",
        );
  return `let quad = (lane / ${words}u) * ${quads}u; let word = lane % ${words}u;
    let valueAt = ${codes}u + (word / ${perPart}u) * ${PART_STRIDE}u + (word % ${perPart}u) * ${TOKEN_STRIDE}u + quad / 4u; let valueComponent = quad & 3u;
    ${each(quads, unpack, "\n    ")}
    ${stores}`;
}

function valuePhase(plan: Plan): { readonly prologue: string; readonly body: string } {
  const { template, d, queries, tiles, factors, parts, left, codes, logits, groups, dialect } = plan;
  const words = d / codesPerWord(template.format.valueBits);
  const names = [...range(words / 4).map((c) => `Code${c}`), "Meta"];
  const partLeft = leftPartStride(tiles * factors);
  const accumulators = range(tiles).flatMap((t) => range(parts * 2).map((n) => `acc${t}_${n}`));
  const prologue = `  ${names
    .map((name) => `n${name === "Meta" ? "vMeta" : `v${name}`}`)
    .map((name) => `var ${name} = vec4u();`)
    .join(" ")}
${valueLoads(plan, "nv", "begin")}`;
  const body = `  ${accumulators.map((name) => `var ${name} = ${dialect.zero};`).join(" ")}
  for (var g = 0u; g < segment; g++) {
    ${names.map((name) => `let v${name} = nv${name};`).join(" ")}
    let following = begin + min(g + 1u, segment - 1u);
${valueLoads(plan, "nv", "following")}
    ${storeValues(plan)}
    { let m = scales(vMeta);
      let factor = vec4f(m[0].x, m[1].x, m[2].x, m[3].x) * valueInverse;
      let zero = vec4f(m[0].y, m[1].y, m[2].y, m[3].y);
      let quadOf = metaLane / ${parts}u; let leftAt = ${left}u + (metaLane % ${parts}u) * ${partLeft}u + quadOf / 4u;
${each(
  queries,
  (r) => `      { let p = bitcast<vec4f>(staged[${logits + r * groups * 8}u + g * 8u + quadOf]);
        zeros${r} += dot(p, zero);
        let t = fma(p, factor, vec4f(${ROUNDING}.0));
        ${storePieces(plan, "t", (row) => `leftAt + ${row * TOKEN_STRIDE}u`, "quadOf & 3u", r)} }`,
)} }
    workgroupBarrier();
${each(
  parts,
  (
    p,
  ) => `    { ${each(tiles, (t) => dialect.loadFactors(`vf${t}_${p}`, { array: "staged", offset: `${left + p * partLeft + t * factors * TOKEN_STRIDE}u`, stride: TOKEN_STRIDE }), " ")}
${each(
  2,
  (
    n,
  ) => `      ${dialect.loadCodes(`vc${p}_${n}`, { array: "staged", offset: `${codes + p * PART_STRIDE + n * 16 * TOKEN_STRIDE}u`, stride: TOKEN_STRIDE })}
      ${each(tiles, (t) => dialect.multiplyAccumulate(`acc${t}_${p * 2 + n}`, `vc${p}_${n}`, `vf${t}_${p}`), " ")}`,
)} }`,
)}
    workgroupBarrier();
  }`;
  return { prologue, body };
}

/** The sums of a segment join the outputs: the lane's channel of each part. */
function addOutputs(plan: Plan): string {
  const { queries, tiles, parts } = plan;
  return each(
    parts,
    (p) => `  ${each(tiles, (t) => each(2, (n) => storeSums(plan, t, n, `acc${t}_${p * 2 + n}`), " "), " ")}
  { let partStep = bitcast<f32>(laneRead(bitcast<u32>(valueStep), ${p}u, lane));
    workgroupBarrier();
${readSums(plan)}
    ${each(queries, (r) => `out${r}_${p} = fma(f32(whole${r}), partStep, out${r}_${p});`, " ")} }
  workgroupBarrier();`,
  );
}

function storePartials(plan: Plan): string {
  const { template, d, queries, parts } = plan;
  const { heads, shape } = template;
  const perWord = codesPerWord(template.format.valueBits);
  const perPart = KV_GROUP / perWord;
  const gqa = heads / shape.kvHeads;
  const exact = gqa % queries === 0;
  const when = (r: number, text: string) => (exact || r === 0 ? text : `if (firstQuery + ${r}u < ${gqa}u) { ${text} }`);
  return `  // Column n of a part is channel (n % words) * C + n / words of it.
  let outChannel = (lane % ${perPart}u) * ${perWord}u + lane / ${perPart}u;
${each(
  queries,
  (r) => `  ${range(3)
    .map((i) => `zeros${r} += bitcast<f32>(laneXor(bitcast<u32>(zeros${r}), ${parts << i}u, lane));`)
    .join(" ")}
  let at${r} = ((wid.z * ${heads}u + head${r}) * params.splits + wid.x) * ${d + 2}u;
  { let total = laneSum(total${r}, lane); if (lane == 0u) { ${when(r, `partials[at${r} + ${d}u] = top${r}; partials[at${r} + ${d + 1}u] = total;`)} } }
${each(
  parts,
  (p) => `  { let zero = bitcast<f32>(laneRead(bitcast<u32>(zeros${r}), ${p}u, lane));
    ${when(r, `partials[at${r} + ${p * KV_GROUP}u + outChannel] = out${r}_${p} + zero;`)} }`,
)}`,
)}`;
}

/**
 * Bindings: qkv f32, pages (as vec4), rows, pageTable, partials, rope table. Grid: splits, `decodeMatrixTiles`, rows.
 * Immediates: one, firstRow, step, splitTokens (a multiple of 32, at most 1024), splits, walk (ignored: always 1).
 */
export function decodeMatrixWgsl(template: DecodeMatrixTemplate): string {
  const { shape, format, maxPages } = template;
  const plan = planOf(template);
  const { dialect } = plan;
  const layout = kvPageLayout(format, shape);
  const { metaLanes, queries } = plan;
  const perWord = codesPerWord(format.keyBits);
  const metaPerWord = perWord / 4;
  const tilesPerHead = Math.ceil(template.heads / shape.kvHeads / queries);
  const values = valuePhase(plan);
  const body = `
@compute @workgroup_size(${DECODE_MATRIX_THREADS}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32) {
  let kvHead = wid.y / ${tilesPerHead}u; let firstQuery = wid.y % ${tilesPerHead}u * ${queries}u;
  let row = params.firstRow + wid.z;
  let position = rows[row].x + params.step;
  let slot = rows[row].y;
  let sealed = position - position % ${shape.residualTokens}u;
  let start = wid.x * params.splitTokens;
  if (start >= sealed) { return; }
  // Groups of 32 tokens: the first of the sequence's, and how many. Lane i knows the page of the i-th.
  let first = start / 32u;
  let count = (min(start + params.splitTokens, sealed) - start) / 32u;
  let pageId = pageTable[slot * ${maxPages}u + (first + min(lane, count - 1u)) / ${shape.blockTokens / KV_GROUP}u];
  let metaLane = lane & ${metaLanes - 1}u;
  // Channels of the lane in the order of bytes of an unpacked word: word metaLane / ${metaPerWord}, place jWord in each byte.
  let place = metaLane & ${metaPerWord - 1}u;
  let upper = (place & ${metaPerWord / 2}u) != 0u;
  let jCode = ${metaPerWord === 4 ? "2u * (place & 1u) + (place >> 1u)" : "place"};
  let channel = (metaLane / ${metaPerWord}u) * ${perWord}u + jCode;
  let jWord = ${metaPerWord === 4 ? "jCode" : "(metaLane & 2u) + jCode"};
${loadQueries(plan)}
  ${each(queries, (r) => `var top${r} = -1.0e30; var total${r} = 0.0; var zeros${r} = 0.0; ${each(plan.parts, (p) => `var out${r}_${p} = 0.0;`, " ")}`)}
${firstKeys(plan)}
  for (var begin = 0u; begin < count; begin += ${plan.groups}u) {
  let segment = min(${plan.groups}u, count - begin);
  ${each(queries, (r) => `var best${r} = -1.0e30;`, " ")} var valueTop = 0.0;
${keyPhase(plan)}
${values.prologue}
${softmax(plan)}
${values.body}
${addOutputs(plan)}
  }
${storePartials(plan)}
}`;
  return `requires immediate_address_space;
${dialect.directives}
@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> pageTable: array<u32>;
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;
@group(0) @binding(5) var<storage, read> ropeTable: array<vec2f>;
${DECODE_SPLIT_STEP}
${queryRopeWgsl(template)}
var<workgroup> staged: array<vec4<u32>, ${plan.stagedSize}>;
fn pageStart(page: u32, kvHead: u32) -> u32 { return page * ${layout.page / 4}u + kvHead * ${layout.head / 4}u; }
fn normWord(page: u32, word: u32) -> u32 { return pages[page * ${layout.page / 4}u + ${Math.floor(layout.norms / 4)}u + word / 4u][word & 3u]; }
fn ordered(x: f32) -> u32 { let b = bitcast<u32>(x); return select(b | 0x80000000u, ~b, (b >> 31u) == 1u); }
fn fromOrdered(x: u32) -> f32 { return bitcast<f32>(select(~x, x & 0x7fffffffu, (x >> 31u) == 1u)); }
fn laneTurn(x: vec4f, mask: u32, lane: u32) -> vec4f {
  let other = bitcast<vec4f>(laneXor4(bitcast<vec4u>(x), mask, lane));
  return select(x + other, other - x, (lane & mask) != 0u);
}
${HELPERS}
${body}
${dialect.functions()}`;
}
