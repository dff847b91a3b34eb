/**
 * WGSL of attention over sealed pages and f16 tokens. Three entry points share one body:
 *
 * - prefill: a tile of query rows of one residual window; all sealed groups before the window, then the window's f16 rows;
 * - split: one row, 256 sealed tokens, unnormalized result to a partial;
 * - merge: one row's partials in order, then its residual.
 *
 * A workgroup is LANES threads that act as one vector. For logits a lane is a token (32 / LANES vectors make a group of
 * 32); for the output a lane is a channel. Folded as in KIVI's algebra: logit = sum (q scale) code + sum q zero, output =
 * sum (p scale) code + sum p zero. Codes are masked in place, not shifted down: lane c's factor 2^-(bits * place) is
 * exact and joins q (or the finished output). Softmax is online in base 2, over groups of 32 in order of position, so a
 * row's result does not depend on the other rows of its tile.
 */
import type { KvFormat, KvShape } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";

/** Sealed tokens of one decode split: fixed positions of the sequence. */
export const SPLIT_TOKENS = 256;

/** Workgroup of one vector, and whether lanes talk through subgroup operations or through workgroup memory. */
export interface LanePlan {
  readonly lanes: number;
  readonly subgroups: boolean;
}

export interface AttentionTemplate {
  readonly format: KvFormat;
  readonly shape: KvShape;
  readonly heads: number;
  readonly maxPages: number;
  /** Splits of one row's partials buffer. */
  readonly maxSplits: number;
  readonly lanePlan: LanePlan;
  /** Query heads of one KV head taken by a workgroup: divides heads / kvHeads. */
  readonly queryHeads: number;
  /** Query rows of a prefill tile. */
  readonly tileRows: number;
  /** Factor of the logits. */
  readonly scale: number;
}

type Kind = "prefill" | "split" | "merge";

const SENTINEL = "-1.0e30";

const range = (count: number) => Array.from({ length: count }, (_, i) => i);
const each = (count: number, text: (i: number) => string, separator = "\n") => range(count).map(text).join(separator);

interface Shapes {
  readonly template: AttentionTemplate;
  readonly kind: Kind;
  readonly d: number;
  readonly lanes: number;
  /** Vectors of tokens in a group of 32. */
  readonly tokenVectors: number;
  /** Vectors of channels in a head. */
  readonly channelVectors: number;
  /** Queries of a workgroup. */
  readonly queries: number;
  readonly parts: number;
}

function shapesOf(template: AttentionTemplate, kind: Kind): Shapes {
  const { lanes } = template.lanePlan;
  const d = template.shape.headDim;
  const rows = kind === "prefill" ? template.tileRows : 1;
  return {
    template,
    kind,
    d,
    lanes,
    tokenVectors: 32 / lanes,
    channelVectors: d / lanes,
    queries: rows * template.queryHeads,
    parts: template.format.valueBits === 16 ? 0 : d / 32,
  };
}

function reductions({ template, lanes }: Shapes): string {
  if (template.lanePlan.subgroups) {
    return `
fn laneSum(x: f32, lane: u32) -> f32 { return subgroupAdd(x); }
fn laneMax(x: f32, lane: u32) -> f32 { return subgroupMax(x); }`;
  }
  const tree = (name: string, combine: string) => `
fn ${name}(x: f32, lane: u32) -> f32 {
  workgroupBarrier();
  reduce[lane] = x;
  workgroupBarrier();
  var total = reduce[0];
  for (var i = 1u; i < ${lanes}u * params.one; i++) { total = ${combine}; }
  return total;
}`;
  return tree("laneSum", "total + reduce[i]") + tree("laneMax", "max(total, reduce[i])");
}

/** Text of the f32 code at place `place` of word `word`, times 2^(bits * (place % half)). */
function maskedCode(bits: number, word: string, place: number): string {
  const half = 16 / bits;
  const mask = ((1 << bits) - 1) << (bits * (place % half));
  return `f32(i32(${place < half ? word : `(${word} >> 16u)`} & ${mask}u))`;
}

/** Factor that undoes the places of maskedCode for channel `c`: an exact power of two. */
function placeFactor(bits: number, channel: string): string {
  const half = 16 / bits;
  return bits === 16 ? "1.0" : `bitcast<f32>((127u - ${bits}u * (${channel} & ${half - 1}u)) << 23u)`;
}

/** Logits of 32 sealed tokens into s{vector}_{query}; `group` is the group in the page, `page` the head's first word. */
function sealedLogits(s: Shapes): string {
  const { d, lanes, tokenVectors, queries, template } = s;
  const bits = template.format.keyBits;
  const { subgroups } = template.lanePlan;
  const layout = kvPageLayout(template.format, template.shape);
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const chunk = Math.max(lanes, perWord);
  const chunkWords = chunk / perWord;
  const vectors = chunk / lanes;
  const wordOf = (v: number, w: number) => `k${v}_${w}`;
  const loads = each(tokenVectors, (v) =>
    each(
      chunkWords,
      (w) => `      let ${wordOf(v, w)} = pages[keyWord(codes, ${v * lanes}u + lane, chunk * ${chunkWords}u + ${w}u)];`,
    ),
  );
  const meta =
    bits === 16
      ? ""
      : `        let inWord = c & ${perWord - 1}u;
        let sz = unpack2x16float(pages[scales + c - inWord + (inWord & ${perWord / 2 - 1}u) * 2u + inWord / ${perWord / 2}u]);
        let place = sz.x * ${subgroups ? placeFactor(bits, "c") : "1.0"};`;
  const code = (v: number, k: number) =>
    bits === 16
      ? `unpack2x16float(${wordOf(v, k >> 1)}).${k & 1 ? "y" : "x"}`
      : maskedCode(bits, wordOf(v, Math.floor(k / perWord)), k % perWord);
  const folded = (u: number) => `        let c = chunk * ${chunk}u + ${u * lanes}u + lane;
${meta}
${each(queries, (m) => `        let qv${m} = qSealed[${m * d}u + c]; let f${m} = qv${m}${bits === 16 ? "" : " * place"}; ${bits === 16 ? "" : `z${m} = fma(qv${m}, sz.y, z${m});`}`)}`;
  const multiply = (factor: (m: number) => string, value: (v: number) => string) =>
    `${each(tokenVectors, (v) => `let x${v} = ${value(v)};`, " ")}
${each(queries, (m) => `          let b${m} = ${factor(m)}; ${each(tokenVectors, (v) => `s${v}_${m} = fma(b${m}, x${v}, s${v}_${m});`, " ")}`)}`;
  const vector = (u: number) => `      {
${folded(u)}
${each(
  lanes,
  (j) =>
    `        { ${multiply(
      (m) => `subgroupBroadcast(f${m}, ${j}u)`,
      (v) => code(v, u * lanes + j),
    )} }`,
)}
      }`;
  // Without subgroup operations the factors of a chunk meet in workgroup memory, and codes are shifted down in a loop.
  const shifted = (v: number) =>
    bits === 16
      ? `unpack2x16float(${wordOf(v, 0)} >> (16u * j)).x`
      : `f32((${wordOf(v, 0)} >> (${bits}u * j)) & ${2 ** bits - 1}u)`;
  const exchanged = `      workgroupBarrier();
${each(vectors, (u) => `      {\n${folded(u)}\n${each(queries, (m) => `        exchange[${m * chunk + u * lanes}u + lane] = f${m};`)}\n      }`)}
      workgroupBarrier();
      for (var w = 0u; w < ${chunkWords}u * params.one; w++) {
${each(tokenVectors, (v) => `        let ${wordOf(v, 0)} = pages[keyWord(codes, ${v * lanes}u + lane, chunk * ${chunkWords}u + w)];`)}
        for (var j = 0u; j < ${perWord}u * params.one; j++) {
          ${multiply((m) => `exchange[${m * chunk}u + w * ${perWord}u + j]`, shifted)}
        }
      }`;
  return `    let codes = page + ${layout.keyCodes}u + group * ${words * 32}u;
    let scales = page + ${layout.keyMeta}u + group * ${d}u;
${each(tokenVectors, (v) => `    ${each(queries, (m) => `var s${v}_${m} = 0.0;`, " ")}`)}
    ${each(queries, (m) => `var z${m} = 0.0;`, " ")}
    for (var chunk = 0u; chunk < ${d / chunk}u * params.one; chunk++) {
${subgroups ? `${loads}\n${each(vectors, vector)}` : exchanged}
    }
${bits === 16 ? "" : each(queries, (m) => `    z${m} = laneSum(z${m}, lane);`)}
${each(tokenVectors, (v) => {
  const norm = template.format.rotated
    ? `    let n${v} = unpack2x16float(pages[norms + (group * 32u + ${v * lanes}u + lane) / 2u] >> ((lane & 1u) * 16u)).x;\n`
    : "";
  return `${norm}    ${each(queries, (m) => `s${v}_${m} = (s${v}_${m} + z${m})${norm ? ` * n${v}` : ""};`, " ")}`;
})}`;
}

/** Online softmax of s{v}_{m}: leaves p{v}_{m}, updates top{m}, total{m}, and scales the accumulators. */
function softmaxStep(s: Shapes, masked: boolean): string {
  const { tokenVectors, queries, channelVectors, parts } = s;
  const quantized = !masked && s.template.format.valueBits < 16;
  return each(queries, (m) => {
    const best = range(tokenVectors).reduce((text, v) => (text ? `max(${text}, s${v}_${m})` : `s${v}_${m}`), "");
    const p = (v: number) =>
      masked ? `select(0.0, exp2(s${v}_${m} - next), seen${v}_${m})` : `exp2(s${v}_${m} - next)`;
    return `    ${each(tokenVectors, (v) => `var p${v}_${m} = 0.0;`, " ")}
    { let next = max(top${m}, laneMax(${best}, lane));
      let keep = select(exp2(top${m} - next), 1.0, next == top${m});
      top${m} = next;
      ${each(tokenVectors, (v) => `p${v}_${m} = ${p(v)};`, " ")}
      total${m} = fma(total${m}, keep, ${each(tokenVectors, (v) => `p${v}_${m}`, " + ")});
      ${each(channelVectors, (c) => `o${m}_${c} *= keep;`, " ")} ${quantized ? each(parts, (g) => `zero${m}_${g} *= keep;`, " ") : ""} }`;
  });
}

/** Adds p * V of 32 sealed tokens to o{m}_{c} (times the place factor) and p * zero to zero{m}_{part}. */
function sealedOutput(s: Shapes): string {
  const { d, lanes, tokenVectors, channelVectors, queries, parts, template } = s;
  const bits = template.format.valueBits;
  const layout = kvPageLayout(template.format, template.shape);
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const base = `    let values = page + ${layout.valueCodes}u + group * ${words * 32}u;\n`;
  if (bits === 16) {
    return (
      base +
      halfOutput(
        s,
        (token, channel) =>
          `pages[values + ((${token} >> 2u) * ${words}u + (${channel} >> 1u)) * 4u + (${token} & 3u)]`,
      )
    );
  }
  const half = perWord / 2;
  const fold = each(tokenVectors, (v) =>
    each(
      parts,
      (
        g,
      ) => `    { let t = ${v * lanes}u + lane; let sz = unpack2x16float(pages[values - valueShift + ((t >> 2u) * ${parts}u + ${g}u) * 4u + (t & 3u)]);
      ${each(queries, (m) => `weights[${(g * queries + m) * 32}u + t] = p${v}_${m} * sz.x; zero${m}_${g} = fma(p${v}_${m}, sz.y, zero${m}_${g});`, " ")} }`,
    ),
  );
  const shift = `    let valueShift = ${layout.valueCodes}u + group * ${words * 32}u - (${layout.valueMeta}u + group * ${d}u);`;
  const accumulate = (weight: (m: number, g: number) => string) =>
    each(
      queries,
      (m) =>
        `          { ${each(parts, (g) => `let pb${g} = ${weight(m, g)};`, " ")} ${each(channelVectors, (c) => `o${m}_${c} = fma(pb${Math.floor((c * lanes) / 32)}, v${c}, o${m}_${c});`, " ")} }`,
    );
  if (!template.lanePlan.subgroups) {
    const code = (c: number) =>
      `let v${c} = f32((pages[values + ((t >> 2u) * ${words}u + (${c * lanes}u + lane) / ${perWord}u) * 4u + (t & 3u)] >> (${bits}u * ((${c * lanes}u + lane) & ${perWord - 1}u))) & ${2 ** bits - 1}u);`;
    return `${base}${shift}
${fold}
    workgroupBarrier();
    for (var t = 0u; t < 32u * params.one; t++) {
      ${each(channelVectors, code, "\n      ")}
${accumulate((m, g) => `weights[${(g * queries + m) * 32}u + t]`)}
    }
    workgroupBarrier();`;
  }
  const vector = (v: number) => `    { let base = values + ${v * lanes * words}u;
${each(words, (w) => `      let w${w} = pages[base + ${w * lanes}u + lane];`)}
${each(
  parts,
  (
    g,
  ) => `      let sz${g} = unpack2x16float(pages[values - valueShift + ${v * (lanes / 4) * parts * 4}u + ((lane >> 2u) * ${parts}u + ${g}u) * 4u + (lane & 3u)]);
      ${each(queries, (m) => `let pw${g}_${m} = p${v}_${m} * sz${g}.x; zero${m}_${g} = fma(p${v}_${m}, sz${g}.y, zero${m}_${g});`, " ")}`,
)}
${each(
  lanes,
  (j) => `        { ${valueCodes(s, j)}
${accumulate((m, g) => `subgroupBroadcast(pw${g}_${m}, ${j}u)`)} }`,
)} }`;
  return `${base}${shift}
    let placeMask = ${2 ** bits - 1}u << (${bits}u * (lane & ${half - 1}u));
    let highShift = ((lane / ${half}u) & 1u) * 16u;
${each(tokenVectors, vector)}`;
}

/** Codes of token `j` of a vector of tokens as v{channelVector}, in place (subgroups only): words are in w0, w1, ... */
function valueCodes({ template, d, lanes, channelVectors }: Shapes, j: number): string {
  const bits = template.format.valueBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const half = perWord / 2;
  // A vector of channels lies in one word if it is not longer than a word; else each lane picks its own.
  const oneWord = lanes <= perWord;
  const word = (c: number) => {
    const index = ((j >> 2) * words + Math.floor((c * lanes) / perWord)) * 4 + (j & 3);
    const loaded = Math.floor(index / lanes);
    if (oneWord) return `subgroupBroadcast(w${loaded}, ${index % lanes}u)`;
    return `subgroupShuffle(w${loaded}, (${index % lanes}u + lane / ${perWord}u * 4u) & ${lanes - 1}u)`;
  };
  const high = (text: string, c: number) => {
    if (lanes > half) return `(${text} >> highShift)`;
    return (c * lanes) % perWord >= half ? `(${text} >> 16u)` : text;
  };
  const mask = (c: number) => {
    const place = lanes < half ? (c * lanes) % half : 0;
    return place === 0 ? "placeMask" : `(placeMask << ${bits * place}u)`;
  };
  return each(
    channelVectors,
    (c) => {
      const name = `x${j}_${oneWord ? Math.floor((c * lanes) / perWord) : c}`;
      const first = !oneWord || (c * lanes) % perWord === 0;
      return `${first ? `let ${name} = ${word(c)}; ` : ""}let v${c} = f32(i32(${high(name, c)} & ${mask(c)}));`;
    },
    "\n          ",
  );
}

/** Adds p * V of 32 f16 tokens; `word(token, channel)` is the text of the u32 that holds the channel. */
function halfOutput(s: Shapes, word: (token: string, channel: string) => string): string {
  const { lanes, tokenVectors, channelVectors, queries } = s;
  return `${each(tokenVectors, (v) => `    ${each(queries, (m) => `weights[${m * 32 + v * lanes}u + lane] = p${v}_${m};`, " ")}`)}
    workgroupBarrier();
    for (var t = 0u; t < 32u * params.one; t++) {
        ${each(channelVectors, (c) => `let v${c} = unpack2x16float(${word("t", `(${c * lanes}u + lane)`)} >> ((lane & 1u) * 16u)).x;`, "\n        ")}
${each(queries, (m) => `        { let pb = weights[${m * 32}u + t]; ${each(channelVectors, (c) => `o${m}_${c} = fma(pb, v${c}, o${m}_${c});`, " ")} }`)}
    }
    workgroupBarrier();`;
}

/** Logits of up to 32 f16 tokens from `first` on; row m sees tokens up to its own. */
function halfLogits(s: Shapes): string {
  const { d, lanes, tokenVectors, queries, template } = s;
  const heads = template.queryHeads;
  const words = lanes / 2;
  const multiply = (factor: (m: number, at: 0 | 1) => string, word: (v: number) => string) =>
    `{ ${each(tokenVectors, (v) => `let x${v} = unpack2x16float(${word(v)});`, " ")}
${each(queries, (m) => `        { let b0 = ${factor(m, 0)}; let b1 = ${factor(m, 1)}; ${each(tokenVectors, (v) => `s${v}_${m} = fma(b1, x${v}.y, fma(b0, x${v}.x, s${v}_${m}));`, " ")} }`)} }`;
  const loop = template.lanePlan.subgroups
    ? `    for (var chunk = 0u; chunk < ${d / lanes}u * params.one; chunk++) {
${each(tokenVectors, (v) => each(words, (w) => `      let k${v}_${w} = kvRows[a${v} + chunk * ${words}u + ${w}u];`))}
${each(queries, (m) => `      let f${m} = qHalf[${m * d}u + chunk * ${lanes}u + lane];`)}
${each(words, (w) =>
  multiply(
    (m, at) => `subgroupBroadcast(f${m}, ${2 * w + at}u)`,
    (v) => `k${v}_${w}`,
  ),
)}
    }`
    : `    for (var w = 0u; w < ${d / 2}u * params.one; w++) ${multiply(
        (m, at) => `qHalf[${m * d + at}u + 2u * w]`,
        (v) => `kvRows[a${v} + w]`,
      )}`;
  return `${each(tokenVectors, (v) => `    let t${v} = first + ${v * lanes}u + lane; let a${v} = halfRow(min(t${v}, last)); ${each(queries, (m) => `var s${v}_${m} = 0.0;`, " ")}`)}
${loop}
${each(tokenVectors, (v) => each(queries, (m) => `    let seen${v}_${m} = t${v} <= see${Math.floor(m / heads)}; s${v}_${m} = select(${SENTINEL}, s${v}_${m}, seen${v}_${m});`))}`;
}

function declarations(s: Shapes): string {
  const { queries, channelVectors, parts } = s;
  return each(
    queries,
    (m) =>
      `  var top${m} = ${SENTINEL}; var total${m} = 0.0; ${each(channelVectors, (c) => `var o${m}_${c} = 0.0;`, " ")} ${each(parts, (g) => `var zero${m}_${g} = 0.0;`, " ")}`,
  );
}

function sealedLoop(s: Shapes, from: string, to: string): string {
  const { template } = s;
  const layout = kvPageLayout(template.format, template.shape);
  const groups = template.shape.blockTokens / 32;
  return `  for (var g = ${from}; g < ${to}; g++) {
    let pageStart = pageTable[slot * ${template.maxPages}u + g / ${groups}u] * ${layout.page}u;
    let page = pageStart + kvHead * ${layout.head}u;
    let norms = pageStart + ${layout.norms}u;
    let group = g % ${groups}u;
${sealedLogits(s)}
${softmaxStep(s, false)}
${sealedOutput(s)}
  }`;
}

/** After the sealed part: places undone, zero points added; then o is in true units (still rotated). */
function finishSealed(s: Shapes): string {
  const { lanes, channelVectors, queries, parts, template } = s;
  const bits = template.format.valueBits;
  if (bits === 16) return "";
  return `${each(queries, (m) => each(parts, (g) => `  zero${m}_${g} = laneSum(zero${m}_${g}, lane);`))}
${each(queries, (m) => each(channelVectors, (c) => `  o${m}_${c} = fma(o${m}_${c}, ${template.lanePlan.subgroups ? placeFactor(bits, `(${c * lanes}u + lane)`) : "1.0"}, zero${m}_${Math.floor((c * lanes) / 32)});`))}`;
}

/** Multiplies o by the Hadamard matrix through workgroup memory. */
function unrotate(s: Shapes): string {
  const { d, lanes, channelVectors, queries, template } = s;
  if (!template.format.rotated) return "";
  return `  workgroupBarrier();
${each(queries, (m) => each(channelVectors, (c) => `  qSealed[${m * d + c * lanes}u + lane] = o${m}_${c};`))}
  rotate(lane);
${each(queries, (m) => each(channelVectors, (c) => `  o${m}_${c} = qSealed[${m * d + c * lanes}u + lane];`))}`;
}

function rotateFunction({ d, lanes, queries }: Shapes): string {
  return `
// Orthonormal Hadamard transform of each query's d values in qSealed.
fn rotate(lane: u32) {
  for (var stride = 1u; stride < ${d}u * params.one; stride *= 2u) {
    workgroupBarrier();
    for (var i = lane; i < ${(queries * d) / 2}u * params.one; i += ${lanes}u) {
      let at = (i / stride) * 2u * stride + i % stride;
      let a = qSealed[at]; let b = qSealed[at + stride];
      qSealed[at] = a + b; qSealed[at + stride] = a - b;
    }
  }
  workgroupBarrier();
  for (var i = lane; i < ${queries * d}u * params.one; i += ${lanes}u) { qSealed[i] *= ${1 / Math.sqrt(d)}; }
  workgroupBarrier();
}`;
}

function loadQueries(s: Shapes): string {
  const { d, lanes, queries, template, kind } = s;
  const heads = template.queryHeads;
  const width = (template.heads + 2 * template.shape.kvHeads) * d;
  const scale = template.scale * Math.LOG2E;
  const row = (m: number) => (kind === "prefill" ? `min(firstRow + ${Math.floor(m / heads)}u, lastRow)` : "row");
  const half = kind !== "split";
  const sealed = kind !== "merge";
  return `${each(queries, (m) => `  for (var c = lane; c < ${d}u * params.one; c += ${lanes}u) { let x = qkv[${row(m)} * ${width}u + (firstHead + ${m % heads}u) * ${d}u + c] * ${scale}; ${sealed ? `qSealed[${m * d}u + c] = x;` : ""} ${half ? `qHalf[${m * d}u + c] = x;` : ""} }`)}
  workgroupBarrier();
${sealed && template.format.rotated ? "  rotate(lane);" : ""}`;
}

function halfLoop(s: Shapes): string {
  return `  for (var first = 0u; first <= last; first += 32u) {
${halfLogits(s)}
${softmaxStep(s, true)}
${halfOutput(s, (token, channel) => `kvRows[halfRow(min(first + ${token}, last)) + valuePlane() + (${channel} >> 1u)]`)}
  }`;
}

function head(s: Shapes, bindings: string): string {
  const { d, lanes, queries, template, parts, kind } = s;
  const bits = template.format.keyBits;
  const words = d / codesPerWord(bits);
  const weights = Math.max(1, parts);
  return `requires immediate_address_space;
${template.lanePlan.subgroups ? "enable subgroups;" : ""}
${bindings}
// one is 1: loops that the driver must not unroll multiply their bound by it.
struct Step { one: u32, firstRow: u32 }
var<immediate> params: Step;
var<workgroup> qSealed: array<f32, ${queries * d}>;
${kind === "split" ? "" : `var<workgroup> qHalf: array<f32, ${queries * d}>;`}
var<workgroup> weights: array<f32, ${weights * queries * 32}>;
${template.lanePlan.subgroups ? "" : `var<workgroup> exchange: array<f32, ${queries * 32}>;\nvar<workgroup> reduce: array<f32, ${lanes}>;`}
${reductions(s)}
${
  kind === "merge"
    ? ""
    : `
fn keyWord(codes: u32, token: u32, word: u32) -> u32 {
  let column = word / 4u;
  return codes + column * 128u + token * min(4u, ${words}u - column * 4u) + word % 4u;
}`
}
${template.format.rotated ? rotateFunction(s) : ""}`;
}

const ENTRY = (lanes: number) =>
  `@compute @workgroup_size(${lanes}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32)`;

function headIndex(s: Shapes): string {
  const { template } = s;
  const gqa = template.heads / template.shape.kvHeads;
  return `  let firstHead = wid.y * ${template.queryHeads}u;
  let kvHead = firstHead / ${gqa}u;`;
}

function storeOutput(s: Shapes): string {
  const { d, lanes, queries, channelVectors, template, kind } = s;
  const heads = template.queryHeads;
  const store = (
    m: number,
  ) => `{ let factor = 1.0 / total; let at = (${kind === "prefill" ? `firstRow + ${Math.floor(m / heads)}u` : "row"}) * ${template.heads * d}u + (firstHead + ${m % heads}u) * ${d}u + lane;
    ${each(channelVectors, (c) => `output[at + ${c * lanes}u] = o${m}_${c} * factor;`, " ")} }`;
  return each(
    queries,
    (m) => `  { let total = laneSum(total${m}, lane);
    ${kind === "prefill" ? `if (firstRow + ${Math.floor(m / heads)}u <= lastRow) ${store(m)}` : store(m)} }`,
  );
}

/** Bindings: qkv, pages, half (chunkKv), tiles, pageTable, output. Grid: tiles, heads / queryHeads. */
export function prefillAttentionWgsl(template: AttentionTemplate): string {
  const s = shapesOf(template, "prefill");
  const { shape } = template;
  const plane = (shape.kvHeads * shape.headDim) / 2;
  return `${head(
    s,
    `@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<u32>;
@group(0) @binding(2) var<storage, read> kvRows: array<u32>;
@group(0) @binding(3) var<storage, read> tiles: array<vec4u>;
@group(0) @binding(4) var<storage, read> pageTable: array<u32>;
@group(0) @binding(5) var<storage, read_write> output: array<f32>;
var<private> halfBase: u32;`,
  )}
fn halfRow(token: u32) -> u32 { return halfBase + token * ${2 * plane}u; }
fn valuePlane() -> u32 { return ${plane}u; }
${ENTRY(s.lanes)} {
${headIndex(s)}
  let tile = tiles[wid.x];
  let firstRow = tile.x;
  let lastRow = tile.x + tile.y - 1u;
  let slot = tile.w;
  let inWindow = tile.z % ${shape.residualTokens}u;
  let sealed = tile.z - inWindow;
  let last = inWindow + tile.y - 1u;
  halfBase = (firstRow - inWindow) * ${2 * plane}u + kvHead * ${shape.headDim / 2}u;
${each(template.tileRows, (r) => `  let see${r} = inWindow + ${r}u;`)}
${loadQueries(s)}
${declarations(s)}
${sealedLoop(s, "0u", "sealed / 32u")}
${finishSealed(s)}
${unrotate(s)}
${halfLoop(s)}
${storeOutput(s)}
}`;
}

/** Bindings: qkv, pages, rows, pageTable, partials. Grid: splits, heads / queryHeads, rows. */
export function splitAttentionWgsl(template: AttentionTemplate): string {
  const s = shapesOf(template, "split");
  const { shape, maxSplits } = template;
  const stride = shape.headDim + 2;
  return `${head(
    s,
    `@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<u32>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> pageTable: array<u32>;
@group(0) @binding(4) var<storage, read_write> partials: array<f32>;`,
  )}
${ENTRY(s.lanes)} {
${headIndex(s)}
  let row = params.firstRow + wid.z;
  let position = rows[row].x;
  let slot = rows[row].y;
  let sealed = position - position % ${shape.residualTokens}u;
  let start = wid.x * ${SPLIT_TOKENS}u;
  if (start >= sealed) { return; }
  let end = min(start + ${SPLIT_TOKENS}u, sealed);
${loadQueries(s)}
${declarations(s)}
${sealedLoop(s, "start / 32u", "end / 32u")}
${finishSealed(s)}
${each(
  s.queries,
  (m) => `  { let at = ((wid.z * ${template.heads}u + firstHead + ${m}u) * ${maxSplits}u + wid.x) * ${stride}u;
    ${each(s.channelVectors, (c) => `partials[at + ${c * s.lanes}u + lane] = o${m}_${c};`, " ")}
    let total = laneSum(total${m}, lane);
    if (lane == 0u) { partials[at + ${shape.headDim}u] = top${m}; partials[at + ${shape.headDim + 1}u] = total; } }`,
)}
}`;
}

/** Bindings: qkv, half (residual), rows, partials, output. Grid: 1, heads / queryHeads, rows. */
export function mergeAttentionWgsl(template: AttentionTemplate): string {
  const s = shapesOf(template, "merge");
  const { shape, maxSplits } = template;
  const { residualTokens, headDim, kvHeads } = shape;
  const stride = headDim + 2;
  const row = (kvHeads * headDim) / 2;
  return `${head(
    s,
    `@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> kvRows: array<u32>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> partials: array<f32>;
@group(0) @binding(4) var<storage, read_write> output: array<f32>;
var<private> halfBase: u32;`,
  )}
fn halfRow(token: u32) -> u32 { return halfBase + token * ${row}u; }
fn valuePlane() -> u32 { return ${residualTokens * row}u; }
${ENTRY(s.lanes)} {
${headIndex(s)}
  let row = params.firstRow + wid.z;
  let position = rows[row].x;
  let slot = rows[row].y;
  let last = position % ${residualTokens}u;
  let splits = (position - last + ${SPLIT_TOKENS - 1}u) / ${SPLIT_TOKENS}u;
  halfBase = slot * ${2 * residualTokens * row}u + kvHead * ${headDim / 2}u;
  let see0 = last;
${loadQueries(s)}
${declarations(s)}
${each(
  s.queries,
  (m) => `  for (var split = 0u; split < splits; split++) {
    let at = ((wid.z * ${template.heads}u + firstHead + ${m}u) * ${maxSplits}u + split) * ${stride}u;
    let part = partials[at + ${headDim}u];
    let next = max(top${m}, part);
    let keep = select(exp2(top${m} - next), 1.0, next == top${m});
    let add = select(exp2(part - next), 1.0, next == part);
    top${m} = next;
    // The other kernels keep a total a lane; lane 0 takes what is already summed.
    total${m} = fma(total${m}, keep, select(0.0, partials[at + ${headDim + 1}u] * add, lane == 0u));
    ${each(s.channelVectors, (c) => `o${m}_${c} = fma(o${m}_${c}, keep, partials[at + ${c * s.lanes}u + lane] * add);`, "\n    ")}
  }`,
)}
${unrotate(s)}
${halfLoop(s)}
${storeOutput(s)}
}`;
}
