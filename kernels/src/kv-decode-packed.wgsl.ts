/**
 * WGSL of the decode split with packed f16 multiply-adds. A workgroup is 32 lanes: it takes some queries of one KV head
 * of one row over one split, a group of 32 tokens at a time, and writes a partial for each query.
 *
 * logit = sum (q scale) code + sum q zero. q scale is folded once a group, 4 channels a lane, and read back from workgroup
 * memory, whose bandwidth is what limits: so D / 32 lanes share a token, each has its words of as many tokens, and the
 * parts of a logit meet by shuffles, one token a lane. output = sum (p scale) code + sum p zero: lane = one word of V codes of four tokens.
 *
 * A code masked in place, as a pair of f16, is the subnormal code * 2^(place - 24): two codes for one AND. Powers of two
 * that undo the places join q (or the finished output). Where a driver flushes subnormals, the code goes below the
 * exponent of 1 instead, and the ones are taken back from the zeros. Folded factors are scaled by a power of two so that
 * a group's largest is near 2^14: f16 sums neither overflow nor lose small codes. Softmax weights are relative to the
 * group's own largest logit, and join the running sums in f32.
 */
import { each, range } from "./kv-attention-template.ts";
import { DECODE_LANES, type LaneExchange, laneDirectives, laneFunctions } from "./kv-decode-lanes.ts";
import { KV_GROUP, type KvFormat, type KvShape } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";
import { type QueryRope, queryRopeWgsl } from "./kv-query-rope.wgsl.ts";

/** How a code becomes an f16: as a subnormal, or added to 1 where subnormals are flushed. */
export type CodeForm = "subnormal" | "offset";

export interface DecodePackedTemplate extends QueryRope {
  readonly format: KvFormat;
  readonly shape: KvShape;
  /** Query heads: a multiple of shape.kvHeads. */
  readonly heads: number;
  /** Query heads of one workgroup. */
  readonly queries: number;
  readonly maxPages: number;
  /** Factor of the logits. */
  readonly scale: number;
  readonly form: CodeForm;
  readonly exchange: LaneExchange;
  /** Where the partials are stored: for trials. */
  readonly storeInLoop?: boolean;
  readonly halfSums?: boolean;
  readonly valueRounds?: number;
}

/** Whether the kernel can hold the format and shape. */
export function decodePackedSupports(format: KvFormat, shape: KvShape): boolean {
  return format.keyBits < 16 && format.valueBits < 16 && (shape.headDim === 64 || shape.headDim === 128);
}

/** Queries of a workgroup, and workgroups of a KV head: as equal as possible, at most `most` queries. */
export function queryTiles(queriesPerKvHead: number, most: number): { queries: number; tiles: number } {
  const tiles = Math.ceil(queriesPerKvHead / most);
  return { queries: Math.ceil(queriesPerKvHead / tiles), tiles };
}

/** Words of the immediate block: one, firstRow, step, splitTokens, splits. */
export const DECODE_SPLIT_IMMEDIATES = 5;

/** Text of the immediate block of all split kernels. */
export const DECODE_SPLIT_STEP = `
struct Step { one: u32, firstRow: u32, step: u32, splitTokens: u32, splits: u32 }
var<immediate> params: Step;`;

/** How codes of `bits` in a word become pairs (i, i + C/2) of f16. */
interface Unpacking {
  readonly pairs: number;
  /** Statement that prepares a word. */
  prepare(name: string, word: string): string;
  /** Expression: pair i of a prepared word. */
  pair(name: string, i: number): string;
  /** log2 of pair i's unit over the form's unit. */
  place(i: number): number;
  /** log2 of one over the unit of place 0. */
  readonly unit: number;
  /** What a code of zero is, in units. */
  readonly base: number;
  /** log2 of the largest folded factor. */
  readonly top: number;
}

const hex = (x: number) => `0x${(x >>> 0).toString(16)}u`;

function unpacking(bits: number, form: CodeForm): Unpacking {
  const pairs = 16 / bits;
  const mask = ((1 << bits) - 1) * 0x0001_0001;
  if (form === "offset") {
    // The code's field is moved right below the exponent of 1.
    const shift = (i: number) => 10 - bits - i * bits;
    const moved = (name: string, by: number) =>
      by > 0 ? `(${name} << ${by}u)` : by < 0 ? `(${name} >> ${-by}u)` : name;
    return {
      pairs,
      prepare: (name, word) => `let ${name} = ${word};`,
      pair: (name, i) => `bitcast<vec2<f16>>((${moved(name, shift(i))} & ${hex(mask << (10 - bits))}) | 0x3c003c00u)`,
      place: () => 0,
      unit: bits,
      base: 2 ** bits,
      top: 9,
    };
  }
  // The ten bits of a half's mantissa hold this many fields.
  const inPlace = Math.floor(10 / bits);
  return {
    pairs,
    prepare: (name, word) => `let ${name} = ${word}; let ${name}h = ${name} >> ${inPlace * bits}u;`,
    pair: (name, i) =>
      `bitcast<vec2<f16>>(${i < inPlace ? name : `${name}h`} & ${hex(mask << ((i % inPlace) * bits))})`,
    place: (i) => (i % inPlace) * bits,
    unit: 24,
    base: 0,
    top: 14,
  };
}

interface Plan {
  readonly template: DecodePackedTemplate;
  readonly d: number;
  readonly queries: number;
  readonly parts: number;
  /** Lanes that each own four words of meta; the lanes above repeat them. */
  readonly metaLanes: number;
  readonly key: Unpacking;
  readonly value: Unpacking;
  /** Lanes that share a token's K; each has as many tokens of a group. */
  readonly keyParts: number;
  /** Words of K of one token that a lane takes. */
  readonly laneWords: 2 | 4;
  /** Vec4s of V codes of a group that a lane loads. */
  readonly valueLoads: number;
  readonly valueWords: number;
}

function planOf(template: DecodePackedTemplate): Plan {
  const { format, shape, queries, form } = template;
  const d = shape.headDim;
  const keyWords = d / codesPerWord(format.keyBits);
  const valueWords = d / codesPerWord(format.valueBits);
  return {
    template,
    d,
    queries,
    parts: d / KV_GROUP,
    metaLanes: d / 4,
    key: unpacking(format.keyBits, form),
    value: unpacking(format.valueBits, form),
    keyParts: d / 32,
    laneWords: (keyWords / (d / 32)) as 2 | 4,
    valueLoads: valueWords / 4,
    valueWords,
  };
}

/** Names of what a group's loads fill. */
function loadNames({ keyParts, valueLoads, template }: Plan): readonly string[] {
  const names = [...range(keyParts).map((i) => `Key${i}`), "KeyMeta", ...range(valueLoads).map((i) => `Value${i}`)];
  return [...names, "ValueMeta", ...(template.format.rotated ? ["Norm"] : [])];
}

/** Loads group `g` of the sequence, whose page is `page`, into n*. */
function loads({ template, d, keyParts, laneWords, valueLoads }: Plan, g: string, page: string): string {
  const { format, shape } = template;
  const layout = kvPageLayout(format, shape);
  const norm = `pages[${page} * ${layout.page / 4}u + ${layout.norms / 4}u + group * 4u + token / 8u][(token / 2u) & 3u]`;
  const words = keyParts * laneWords;
  const perVector = 4 / laneWords;
  const key = (i: number) =>
    `${laneWords === 2 ? "keyPages" : "pages"}[at * ${perVector}u + group * ${words * 8 * perVector}u + ${(i * 32 * perVector) / keyParts}u + keyAt]`;
  return `    { let group = ${g} % ${shape.blockTokens / KV_GROUP}u; let at = ${page} * ${layout.page / 4}u + kvHead * ${layout.head / 4}u;
      let valueAt = at + ${layout.valueCodes / 4}u + group * ${valueLoads * 32}u + lane;
      let metaAt = at + group * ${d / 4}u + metaLane;
      ${each(keyParts, (i) => `nKey${i} = ${key(i)};`, " ")} nKeyMeta = pages[metaAt + ${layout.keyMeta / 4}u];
      ${each(valueLoads, (i) => `nValue${i} = pages[valueAt + ${i * 32}u];`, " ")} nValueMeta = pages[metaAt + ${layout.valueMeta / 4}u];
      ${format.rotated ? `nNorm = ${norm};` : ""} }`;
}

/** q{r}: the lane's four channels (c, c + C/2, c + 1, c + 1 + C/2), turned, rotated, times the factor of the logits. */
function loadQueries({ template, d, queries, metaLanes, key }: Plan): string {
  const { shape, heads, format } = template;
  const width = (heads + 2 * shape.kvHeads) * d;
  const gqa = heads / shape.kvHeads;
  const scale = template.scale * Math.LOG2E * (format.rotated ? 1 / Math.sqrt(d) : 1);
  const channel = (i: number) => `channel + ${(i & 1) * key.pairs + (i >> 1)}u`;
  const rotate = (r: number) => `
  q${r} = vec4f(q${r}.x + q${r}.y, q${r}.x - q${r}.y, q${r}.z + q${r}.w, q${r}.z - q${r}.w);
  q${r} = vec4f(q${r}.x + q${r}.z, q${r}.y + q${r}.w, q${r}.x - q${r}.z, q${r}.y - q${r}.w);
  for (var mask = 1u; mask < ${metaLanes}u * params.one; mask *= 2u) {
    let other = vec4f(laneXor2(q${r}.xy, mask, lane), laneXor2(q${r}.zw, mask, lane));
    q${r} = select(q${r} + other, other - q${r}, (lane & mask) != 0u);
  }`;
  return `  let channel = (metaLane / ${key.pairs / 2}u) * ${2 * key.pairs}u + (metaLane % ${key.pairs / 2}u) * 2u;
${each(
  queries,
  (
    r,
  ) => `  let head${r} = kvHead * ${gqa}u + min(firstQuery + ${r}u, ${gqa - 1}u); let base${r} = row * ${width}u + head${r} * ${d}u;
  var q${r} = vec4f(${each(4, (i) => `turnedQuery(base${r}, ${channel(i)}, position)`, ", ")}) * ${scale};${format.rotated ? rotate(r) : ""}`,
)}`;
}

/** log2 of the place of the lane's first and second pair, as expressions. */
function placeFactors({ key }: Plan): string {
  const quads = key.pairs / 2;
  const factor = (odd: number) => {
    const values = range(quads).map((k) => 2 ** -key.place(2 * k + odd));
    if (values.every((value) => value === values[0])) return `${values[0]}`;
    return `array<f32, ${quads}>(${values.join(", ")})[metaLane % ${quads}u]`;
  };
  return `  let place0: f32 = ${factor(0)}; let place1: f32 = ${factor(1)};`;
}

/** Four (scale, zero) words as two vec4f; `base` codes are taken back from the zero. */
const meta = (name: string, words: string, base: number) =>
  `let ${name}A = unpack2x16float(${words}.x); let ${name}B = unpack2x16float(${words}.y); let ${name}C = unpack2x16float(${words}.z); let ${name}D = unpack2x16float(${words}.w);
    let ${name}Scale = vec4f(${name}A.x, ${name}B.x, ${name}C.x, ${name}D.x); let ${name}Zero = vec4f(${name}A.y, ${name}B.y, ${name}C.y, ${name}D.y)${base === 0 ? "" : ` - ${name}Scale * ${base}.0`};`;

/** A power of two `raise` that brings the largest of the lanes' values near 2^top, and `back` = 2^unit / raise. */
const powers = (name: string, values: string, { top, unit }: Unpacking) =>
  `let ${name}E = max(laneTop(bitcast<u32>(${values}), lane), 0x10000000u) & 0x7f800000u; let ${name}Raise = bitcast<f32>(${hex((254 + top) << 23)} - ${name}E); let ${name}Back = bitcast<f32>(${name}E + ${hex((unit - top) << 23)});`;

const most = (v: string) => `max(max(${v}.x, ${v}.y), max(${v}.z, ${v}.w))`;

/** Adds the lanes' parts of `parts` tokens, so that part i has token i: s{r}. Halves: pairs of f16, one exchange for both. */
function scatterLogits(r: number, parts: number, halves: boolean): string {
  let names = range(parts).map((i) => `${halves ? "acc" : "s"}${r}_${i}`);
  const text: string[] = [];
  for (let mask = 1; mask < parts; mask *= 2) {
    const next = range(names.length / 2).map((i) => `t${r}_${mask}_${i}`);
    next.forEach((name, i) => {
      const [even, odd] = [names[2 * i], names[2 * i + 1]];
      const send = `select(${odd}, ${even}, keyOdd${mask})`;
      const received = halves ? `laneXorHalves(${send}, ${mask}u, lane)` : `laneXor(${send}, ${mask}u, lane)`;
      text.push(`let ${name} = select(${even}, ${odd}, keyOdd${mask}) + ${received};`);
    });
    names = next;
  }
  if (!halves) return `${text.join(" ")} let s${r} = ${names[0]};`;
  return `${text.join(" ")} let h${r} = vec2f(${names[0]}); let s${r} = h${r}.x + h${r}.y;`;
}

/** Logits, relative weights p{r}, the group's logit g{r}. */
function keyPhase(plan: Plan): string {
  const { template, d, queries, key, keyParts, laneWords, metaLanes } = plan;
  const { rotated } = template.format;
  const chunks = d / 8 + keyParts;
  const mine = (text: string) => (metaLanes < DECODE_LANES ? `select(0.0, ${text}, lane < ${metaLanes}u)` : text);
  const perWord = key.pairs / 4;
  // Sums of codes that carry an offset are large: f32 takes each word's.
  const flush = template.form === "offset" ? 1 : laneWords;
  const halves = template.halfSums === true && template.form !== "offset";
  const word = (
    w: number,
  ) => `    { ${each(queries, (r) => each(perWord, (c) => `let f${r}_${c} = folded[${r * chunks + w * perWord + c}u + foldedAt];`, " "), " ")}
${each(
  keyParts,
  (
    t,
  ) => `      { ${key.prepare("w", `cKey${t}.${"xyzw"[w]}`)} ${each(key.pairs, (i) => `let e${i} = ${key.pair("w", i)};`, " ")}
${each(
  queries,
  (
    r,
  ) => `        ${w % flush === 0 ? `acc${r}_${t} = vec2<f16>();` : ""} ${each(key.pairs, (i) => `acc${r}_${t} = fma(bitcast<vec2<f16>>(f${r}_${i >> 2}.${"xyzw"[i & 3]}), e${i}, acc${r}_${t});`, " ")}
        ${!halves && w % flush === flush - 1 ? `{ let t = vec2f(acc${r}_${t}); s${r}_${t} += t.x + t.y; }` : ""}`,
)} }`,
)} }`;
  return `    ${meta("k", "cKeyMeta", key.base)}
${each(
  queries,
  (r) => `    let x${r} = q${r} * kScale; let y${r} = abs(x${r});
    ${powers(`k${r}`, most(`y${r}`), key)}
    { let a = x${r}.xy * (k${r}Raise * place0); let b = x${r}.zw * (k${r}Raise * place1);
      let at = ${r * chunks}u + metaLane / 2u + metaLane / ${d / 4 / keyParts}u;
      folded[at][(metaLane & 1u) * 2u] = bitcast<u32>(vec2<f16>(a)); folded[at][(metaLane & 1u) * 2u + 1u] = bitcast<u32>(vec2<f16>(b)); }
    let zero${r} = laneSum(${mine(`dot(q${r}, kZero)`)}, lane);
    ${each(keyParts, (t) => `var s${r}_${t} = 0.0; var acc${r}_${t} = vec2<f16>();`, " ")}`,
)}
    workgroupBarrier();
${range(laneWords).map(word).join("\n")}
    ${rotated ? "let norm = unpack2x16float(cNorm >> ((token & 1u) * 16u)).x;" : ""}
${each(
  queries,
  (r) => `    ${scatterLogits(r, keyParts, halves)}
    let logit${r} = ${rotated ? `fma(s${r}, k${r}Back, zero${r}) * norm` : `s${r} * k${r}Back`};
    let best${r} = laneMax(logit${r}, lane); let p${r} = exp2(logit${r} - best${r}); let g${r} = best${r}${rotated ? "" : ` + zero${r}`};
    probs[${r * 8}u + token / 4u][token & 3u] = p${r};`,
)}`;
}

/** Joins the group to the running sums: a{r}_{i}, z{r}, total{r}, top{r}. */
function valuePhase(plan: Plan): string {
  const { queries, value, valueLoads, valueWords, parts } = plan;
  const stored = 8 * parts;
  const rounds = plan.template.valueRounds ?? 1;
  const pairsOf = (round: number) => range(value.pairs / rounds).map((i) => i + (round * value.pairs) / rounds);
  const token = (i: number, t: number, pairs: readonly number[]) =>
    `      { ${value.prepare("w", `cValue${i}.${"xyzw"[t]}`)} ${pairs.map((j) => `let e${j} = ${value.pair("w", j)};`).join(" ")}
${each(
  queries,
  (r) =>
    `        { let p = vec2<f16>(w${r}${t >> 1}.${"xy"[t & 1]}); ${pairs.map((j) => `h${r}_${j} = fma(p, e${j}, h${r}_${j});`).join(" ")} }`,
)} }`;
  const round = (
    pairs: readonly number[],
  ) => `    { ${each(queries, (r) => pairs.map((j) => `var h${r}_${j} = vec2<f16>();`).join(" "), " ")}
${each(
  valueLoads,
  (
    i,
  ) => `    { ${each(queries, (r) => `let w${r} = weights[${r * stored + i * (32 / valueWords) * parts}u + valueAt]; let w${r}0 = bitcast<vec2<f16>>(w${r}.x); let w${r}1 = bitcast<vec2<f16>>(w${r}.y);`, " ")}
${each(4, (t) => token(i, t, pairs))} }`,
)}
${each(queries, (r) => `    { let join = join${r} * vBack; ${pairs.map((j) => `a${r}_${j} = fma(vec2f(h${r}_${j}), vec2f(join), a${r}_${j});`).join(" ")} }`)} }`;
  return `    ${meta("v", "cValueMeta", value.base)}
    ${powers("v", most("vScale"), value)}
    let vRaised = vScale * vRaise;
    workgroupBarrier();
${each(
  queries,
  (
    r,
  ) => `    if (g${r} > top${r}) { let keep = exp2(top${r} - g${r}); top${r} = g${r}; total${r} *= keep; z${r} *= keep; ${each(value.pairs, (j) => `a${r}_${j} *= keep;`, " ")} }
    let join${r} = exp2(g${r} - top${r}); total${r} = fma(p${r}, join${r}, total${r});
    { let p = probs[${r * 8}u + metaLane / ${parts}u]; z${r} = fma(dot(p, vZero), join${r}, z${r}); let x = p * vRaised;
      weights[${r * stored}u + metaLane] = vec2u(bitcast<u32>(vec2<f16>(x.xy)), bitcast<u32>(vec2<f16>(x.zw))); }`,
)}
    workgroupBarrier();
${range(rounds)
  .map((i) => round(pairsOf(i)))
  .join("\n")}`;
}

/** Writes the split's partials. */
function storePartials(plan: Plan): string {
  const { template, d, queries, value, valueWords, parts } = plan;
  const { heads, shape, format } = template;
  const gqa = heads / shape.kvHeads;
  const perWord = codesPerWord(format.valueBits);
  const masks = range(Math.log2(DECODE_LANES / valueWords)).map((i) => valueWords << i);
  const exact = gqa % queries === 0;
  const scatter = (r: number) => {
    let pairs = value.pairs;
    return masks
      .map((mask, step) => {
        pairs /= 2;
        const from = step === 0 ? `a${r}_` : `o${step - 1}_`;
        return each(
          pairs,
          (i) =>
            `let o${step}_${i} = select(${from}${i}, ${from}${i + pairs}, upper${step}) + laneXor2(select(${from}${i + pairs}, ${from}${i}, upper${step}), ${mask}u, lane);`,
          " ",
        );
      })
      .join("\n        ");
  };
  const left = value.pairs >> masks.length;
  const last = masks.length - 1;
  const pairOf = masks.map((_, step) => `select(0u, ${value.pairs >> (step + 1)}u, upper${step})`).join(" + ");
  const when = (r: number, text: string) => (exact || r === 0 ? text : `if (firstQuery + ${r}u < ${gqa}u) { ${text} }`);
  return `      ${masks.map((mask, step) => `let upper${step} = (lane & ${mask}u) != 0u;`).join(" ")}
      let outChannel = (lane % ${valueWords}u) * ${perWord}u + ${pairOf};
${each(
  queries,
  (r) => `      { ${range(value.pairs)
    .filter((j) => value.place(j) !== 0)
    .map((j) => `a${r}_${j} *= ${2 ** -value.place(j)};`)
    .join(" ")}
        ${scatter(r)}
        ${each(3, (i) => `z${r} += laneXor(z${r}, ${parts << i}u, lane);`, " ")}
        let zero = laneRead(z${r}, (lane % ${valueWords}u) * ${perWord}u / 32u, lane); let total = laneSum(total${r}, lane);
        let out = ((wid.z * ${heads}u + head${r}) * params.splits + wid.x) * ${d + 2}u;
        ${when(
          r,
          `${each(left, (i) => `partials[out + outChannel + ${i}u] = o${last}_${i}.x + zero; partials[out + outChannel + ${i + value.pairs}u] = o${last}_${i}.y + zero;`, " ")}
        if (lane == 0u) { partials[out + ${d}u] = top${r}; partials[out + ${d + 1}u] = total; }`,
        )} }`,
)}`;
}

function declarations(plan: Plan): string {
  const { queries, value, laneWords } = plan;
  return `${each(queries, (r) => `  var top${r} = -1.0e30; var total${r} = 0.0; var z${r} = 0.0; ${each(value.pairs, (j) => `var a${r}_${j} = vec2f();`, " ")}`)}
  ${loadNames(plan)
    .map((name) =>
      name === "Norm"
        ? "var nNorm = 0u;"
        : `var n${name} = ${/^Key\d/.test(name) && laneWords === 2 ? "vec2u" : "vec4u"}();`,
    )
    .join(" ")}`;
}

function head(plan: Plan): string {
  const { template, d, queries, parts } = plan;
  return `requires immediate_address_space;
enable f16;
${laneDirectives(template.exchange)}
@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<vec4u>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> pageTable: array<u32>;
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;
@group(0) @binding(5) var<storage, read> ropeTable: array<vec2f>;
@group(0) @binding(6) var<storage, read> keyPages: array<vec2u>;
${DECODE_SPLIT_STEP}
// q scale as f16 pairs in the order of K's words, a vec4 of padding after each lane's share; p of 32 tokens; p scale as four tokens' f16 a (quad, 32 channels).
var<workgroup> folded: array<vec4u, ${queries * (d / 8 + plan.keyParts)}>;
var<workgroup> probs: array<vec4f, ${queries * 8}>;
var<workgroup> weights: array<vec2u, ${queries * 8 * parts}>;
${laneFunctions(template.exchange)}
fn laneXorHalves(x: vec2<f16>, mask: u32, lane: u32) -> vec2<f16> { return bitcast<vec2<f16>>(laneXor(bitcast<f32>(x), mask, lane)); }
${queryRopeWgsl(template)}`;
}

/**
 * Bindings: qkv f32, pages, rows, pageTable, partials, ropeTable, pages again. Immediates: {@link DECODE_SPLIT_STEP}. Grid:
 * splits of the longest row, kvHeads × tiles of queries, rows.
 */
export function decodePackedWgsl(template: DecodePackedTemplate): string {
  const plan = planOf(template);
  const { shape, maxPages, heads, queries } = template;
  const { tiles } = queryTiles(heads / shape.kvHeads, queries);
  const { metaLanes, valueWords, parts, keyParts, laneWords } = plan;
  const tokenLane = `(lane / ${keyParts}u)`;
  const keyLane =
    laneWords === 2 ? `(keyPart / 2u) * 64u + ${tokenLane} * 2u + keyPart % 2u` : `keyPart * 32u + ${tokenLane}`;
  const perWord = codesPerWord(template.format.valueBits);
  const pageGroups = shape.blockTokens / KV_GROUP;
  const names = loadNames(plan);
  const pageOf = (g: string) => `pageTable[slot * ${maxPages}u + ${g} / ${pageGroups}u]`;
  return `${head(plan)}
@compute @workgroup_size(${DECODE_LANES}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32) {
  let kvHead = wid.y / ${tiles}u; let firstQuery = wid.y % ${tiles}u * ${queries}u;
  let row = params.firstRow + wid.z;
  let position = rows[row].x + params.step;
  let slot = rows[row].y;
  let sealed = position - position % ${shape.residualTokens}u;
  let start = wid.x * params.splitTokens;
  if (start >= sealed) { return; }
  // Groups of the sequence: the first and the one after the last.
  let first = start / 32u;
  let end = min(start + params.splitTokens, sealed) / 32u;
  let metaLane = lane & ${metaLanes - 1}u;
  // K: the lane's share of a token's words, where it begins in a group, and the token whose logit it ends up with.
  let keyPart = lane % ${keyParts}u;
  let keyAt = ${keyLane};
  let foldedAt = keyPart * ${(plan.d / 8) / keyParts + 1}u;
  let token = keyPart * ${32 / keyParts}u + lane / ${keyParts}u;
  ${range(Math.log2(keyParts))
    .map((bit) => `let keyOdd${1 << bit} = (lane & ${1 << bit}u) != 0u;`)
    .join(" ")}
  // Weights of the lane's word in its first vec4: (quad, part).
  let valueAt = (lane / ${valueWords}u) * ${parts}u + (lane % ${valueWords}u) * ${perWord}u / 32u;
${declarations(plan)}
  var nextPage = ${pageOf("first")};
${loads(plan, "first", "nextPage")}
  nextPage = ${pageOf("min(first + 1u, end - 1u)")};
${loadQueries(plan)}
${placeFactors(plan)}
  for (var g = first; g < end; g++) {
    ${names.map((name) => `let c${name} = n${name};`).join(" ")}
    // The next group's bytes travel while this one is worked on; the page of the one after that is known in time.
    let following = min(g + 1u, end - 1u);
${loads(plan, "following", "nextPage")}
    nextPage = ${pageOf("min(g + 2u, end - 1u)")};
${keyPhase(plan)}
${valuePhase(plan)}
    ${template.storeInLoop ? `if (g + 1u == end) {\n${storePartials(plan)}\n    }` : ""}
  }
${template.storeInLoop ? "" : storePartials(plan)}
}`;
}
