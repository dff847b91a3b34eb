/**
 * WGSL of sealing for GPUs: a workgroup takes 32 tokens of one KV head, a thread 32 neighbouring channels of one token, and
 * everything between the load and the codes stays in registers.
 *
 * Threads are D: thread = token * (D / 32) + part. A group of V is one thread's registers. A group of K is a channel over
 * 32 tokens: its minimum and maximum go by way of workgroup memory. Key norms of rotated formats are made by a kernel of
 * their own before it.
 */
import type { KvFormat, KvShape } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";
import type { KvSealTemplate } from "./kv-seal.wgsl.ts";
import { TO_HALF_WGSL } from "./kv-write.wgsl.ts";
import { type RegisterIndex, type RegisterWriter, registerWriter } from "./registers.wgsl.ts";

/** How threads exchange values: by subgroups of exactly 32, or through workgroup memory, which runs everywhere. */
export type LaneExchange = "subgroup" | "memory";

export interface KvSealTileTemplate extends KvSealTemplate {
  readonly exchange: LaneExchange;
  /** Writes out what is done with the 32 values of a thread; otherwise loops, for drivers that compile slowly. */
  readonly unroll: boolean;
  /** Whether `fma` rounds once, which WGSL leaves open: then quotients are products with a reciprocal, corrected. */
  readonly fused: boolean;
}

/** Bytes of the immediates: the bits of -0.0, which the compiler must not know. */
export const SEAL_TILE_IMMEDIATE_BYTES = 8;
/** The value of the immediate. */
export const NEGATIVE_ZERO_BITS = 0x8000_0000;

/** Threads of a workgroup of the key norms, which takes a pair of tokens. */
const NORM_THREADS = 32;
/** Pairs of tokens in a group: workgroups in x of the key norms. */
export const SEAL_NORM_PAIRS = 16;

/** Whether the tiles hold the format: codes of 2 or 4 bits, and heads of 32, 64 or 128 channels. */
export function sealTileSupports(format: KvFormat, shape: KvShape): boolean {
  return format.keyBits < 16 && format.valueBits < 16 && [32, 64, 128].includes(shape.headDim);
}

/** Values of a thread. */
const COUNT = 32;
/** vec4s from a thread's values to the next one's in workgroup memory: one more than they are, against bank conflicts. */
const TILE_VECTORS = COUNT / 4 + 1;

/** What the text of one branch is written with. */
interface Writer extends RegisterWriter {
  /** Statements that make `to` i, i < count, of what the thread `mask` away has for `value(i)`. */
  exchange(mask: number, count: number, value: (index: RegisterIndex) => string, to: string): string;
}

function writerOf({ exchange, unroll }: KvSealTileTemplate): Writer {
  const registers = registerWriter(unroll);
  const { each, at } = registers;
  return {
    ...registers,
    exchange(mask, count, value, to) {
      if (exchange === "subgroup") {
        return each(count, (i) => `${at(to, i)} = subgroupShuffleXor(${value(i)}, ${mask}u);`);
      }
      const mine = (thread: string, i: RegisterIndex) =>
        `tile[(${thread}) * ${TILE_VECTORS}u + ${i} / 4][${i} % 4]`
          .replaceAll("i / 4]", "i / 4u]")
          .replaceAll("i % 4]", "i % 4u]");
      return `  workgroupBarrier();
${each(count, (i) => `${mine("tid", i)} = ${value(i)};`)}
  workgroupBarrier();
${each(count, (i) => `${at(to, i)} = ${mine(`tid ^ ${mask}u`, i)};`)}`;
    },
  };
}

/** Loads the thread's 32 halves into x, and raises `flagBit` where one is not finite, unless the rotation will tell. */
function loadText(w: Writer, begin: string, flagBit: number, rotated: boolean): string {
  const pairs = [0, 1, 2, 3].flatMap((v) =>
    [0, 1, 2, 3].map((c) => {
      const i = 8 * v + 2 * c;
      return `{ let h = unpack2x16float(w${v}.${"xyzw"[c]}); ${w.at("x", i)} = h.x; ${w.at("x", i + 1)} = h.y; }`;
    }),
  );
  return `  let firstVector = (${begin}) / 4u;
${[0, 1, 2, 3].map((v) => `  let w${v} = source[firstVector + ${v}u];`).join("\n")}
${
  rotated
    ? ""
    : `  // An exponent of all ones carries into the sign's place.
  var overflow = vec4u();
${[0, 1, 2, 3].map((v) => `  overflow |= (w${v} & vec4u(0x7c007c00u)) + vec4u(0x04000400u);`).join("\n")}
  if (((overflow.x | overflow.y | overflow.z | overflow.w) & 0x80008000u) != 0u) { atomicOr(&status[slot], ${flagBit}u); }`
}
${w.declare("x", COUNT)}
  ${pairs.join("\n  ")}`;
}

/** The orthonormal Hadamard transform of x, stages 1, 2, 4, …, in the reference's order. */
function rotateText(w: Writer, headDim: number, flagBit: number): string {
  const text: string[] = [w.declare("other", COUNT)];
  for (let stride = 1; stride < COUNT; stride *= 2) {
    text.push(
      w.pairs(COUNT, stride, (low, high) => {
        const [a, b] = [w.at("x", low), w.at("x", high)];
        return `{ let a = ${a}; let b = ${b}; ${a} = a + b; ${b} = a - b; }`;
      }),
    );
  }
  for (let mask = 1; mask < headDim / COUNT; mask *= 2) {
    text.push(w.exchange(mask, COUNT, (i) => w.at("x", i), "other"));
    text.push(`  let sign${mask} = select(1.0, -1.0, (tid & ${mask}u) != 0u);`);
    text.push(w.each(COUNT, (i) => `${w.at("x", i)} = fma(${w.at("x", i)}, sign${mask}, ${w.at("other", i)});`));
  }
  // Adding an unknown -0.0 keeps the product as it is, rounded: it must not be fused with a later subtraction.
  const factor = Math.fround(1 / Math.sqrt(headDim));
  text.push(w.each(COUNT, (i) => `${w.at("x", i)} = fma(${w.at("x", i)}, ${factor}, params.negativeZero);`));
  // Each of them is a sum of all: one that is not finite makes them all so.
  text.push(
    `  if ((bitcast<u32>(${w.at("x", 0)}) & 0x7f800000u) == 0x7f800000u) { atomicOr(&status[slot], ${flagBit}u); }`,
  );
  return text.join("\n");
}

/** Divides x by the token's norm, correctly rounded. */
function divideText(w: Writer): string {
  return `  // Zero where the norm is: then every quotient is zero too.
  let reciprocal = reciprocalOf(divisor);
${w.each(COUNT, (i) => `${w.at("x", i)} = divideBy(${w.at("x", i)}, divisor, reciprocal);`)}`;
}

/** Quotients as on a CPU: correctly rounded, whatever the driver's division does. */
function divisionText(fused: boolean): string {
  return fused
    ? `
fn reciprocalOf(b: f32) -> f32 {
  let rough = select(1.0 / b, 0.0, b == 0.0);
  return fma(fma(-rough, b, 1.0), rough, rough);
}
// One exact remainder corrects the product.
fn divideBy(a: f32, b: f32, reciprocal: f32) -> f32 {
  let q = a * reciprocal;
  return fma(fma(-q, b, a), reciprocal, q);
}`
    : `
fn reciprocalOf(b: f32) -> f32 { return select(1.0, 0.0, b == 0.0); }
fn divideBy(a: f32, b: f32, reciprocal: f32) -> f32 { return select(divide(a, b), 0.0, reciprocal == 0.0); }`;
}

/**
 * A code is the correctly rounded quotient, rounded half to even into the low bits by adding 1.5 · 2²³. The constant's own
 * bits are subtracted once a word.
 */
const CODES_WGSL = `
// zero, scale, its reciprocal (0 where the scale is: then every code is 0).
fn stepsOf(both: u32) -> vec4f {
  let sz = unpack2x16float(both);
  return vec4f(sz.y, sz.x, reciprocalOf(sz.x), 0.0);
}
fn quotient(x: f32, steps: vec4f) -> f32 { return divideBy(x - steps.x, steps.y, steps.z); }
// Whether rounding scale and zero to f16 put a code of the group out of its range: then all are clamped.
fn isWide(low: f32, high: f32, steps: vec4f, top: f32) -> bool {
  return quotient(low, steps) < -0.5 || quotient(high, steps) >= top + 0.5;
}
// Drivers may divide a unit or two off; one exact remainder makes it the correctly rounded quotient, as on a CPU.
fn divide(a: f32, b: f32) -> f32 {
  let q = a / b;
  return fma(fma(-q, b, a), 1.0 / b, q);
}
fn scaleAndZero(low: f32, high: f32, top: f32) -> u32 {
  return toHalf(divide(high - low, top)) | (toHalf(low) << 16u);
}
fn eitherNotFinite(both: u32) -> bool { return halfNotFinite(both) || halfNotFinite(both >> 16u); }`;

const ROUNDING_BITS = 0x4b40_0000n;

/** Makes `low` and `high` of channel tid over the 32 tokens, by way of workgroup memory. */
function reduceText(w: Writer, headDim: number): string {
  const parts = headDim / COUNT;
  const vectors = Array.from({ length: COUNT / 4 }, (_, v) => {
    const parts4 = [0, 1, 2, 3].map((c) => w.at("x", 4 * v + c));
    return `  tile[tid * ${TILE_VECTORS}u + ${v}u] = vec4f(${parts4.join(", ")});`;
  });
  return `  workgroupBarrier();
${vectors.join("\n")}
  if (tid == 0u) { atomicStore(&anyWide, 0u); }
  workgroupBarrier();
  let column = tid / 32u * ${TILE_VECTORS}u + tid % 32u / 4u;
  var low = tile[column][tid % 4u];
  var high = low;
${w.each(COUNT, (t) => `{ let x = tile[column + ${t} * ${TILE_VECTORS * parts}][tid % 4u]; low = min(low, x); high = max(high, x); }`)}`;
}

/** Statements that make `word` of codes word · perWord …; `steps(i)` is the group of value i. */
function wordText(w: Writer, bits: number, word: number, steps: (i: RegisterIndex) => string, wide: boolean): string {
  const perWord = codesPerWord(bits as 2 | 4);
  let constant = 0n;
  for (let j = 0; j < perWord; j++) constant += ROUNDING_BITS << BigInt(j * bits);
  return `  word = 0u;
${w.each(perWord, (j) => {
  const i = typeof j === "number" ? j + word * perWord : `${j} + ${word * perWord}u`;
  const shift = typeof j === "number" ? `${j * bits}u` : `(${j} * ${bits}u)`;
  const code = `quotient(${w.at("x", i)}, ${steps(i)})`;
  return `word += bitcast<u32>(${wide ? `clamp(${code}, 0.0, ${2 ** bits - 1}.0)` : code} + 12582912.0) << ${shift};`;
})}
  word -= ${constant & 0xffff_ffffn}u;`;
}

function keysText(template: KvSealTileTemplate): string {
  const { format, shape } = template;
  const w = writerOf(template);
  const d = shape.headDim;
  const layout = kvPageLayout(format, shape);
  const bits = format.keyBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const wordsPerPart = COUNT / perWord;
  const codes = (wide: boolean) =>
    Array.from(
      { length: wordsPerPart },
      (_, k) => `${wordText(w, bits, k, (i) => `channelSteps[part * 33u + ${i}]`, wide)}
  {
    let w = part * ${wordsPerPart}u + ${k}u;
    let column = w / 4u;
    pages[head + ${layout.keyCodes}u + group * ${words * 32}u + column * 128u + token * min(4u, ${words}u - column * 4u) + w % 4u] = word;
  }`,
    ).join("\n");
  return `${loadText(w, `fromToken + kvHead * ${d / 2}u + part * 16u`, 1, format.rotated)}
${
  format.rotated
    ? `${rotateText(w, d, 1)}
  let normPair = pages[page + ${layout.norms}u + (group * 32u + token) / 2u];
  let norm = select(normPair & 0xffffu, normPair >> 16u, (token & 1u) == 1u);
  if (halfNotFinite(norm)) { atomicOr(&status[slot], 1u); }
  let divisor = unpack2x16float(norm).x;
${divideText(w)}`
    : ""
}
${reduceText(w, d)}
  let both = scaleAndZero(low, high, ${2 ** bits - 1}.0);
  if (eitherNotFinite(both)) { atomicOr(&status[slot], 1u); }
  let inWord = tid % ${perWord}u;
  pages[head + ${layout.keyMeta}u + group * ${d}u + tid - inWord + (inWord % ${perWord / 2}u) * 2u + inWord / ${perWord / 2}u] = both;
  let steps = stepsOf(both);
  channelSteps[tid + tid / 32u] = steps;
  if (isWide(low, high, steps, ${2 ** bits - 1}.0)) { atomicStore(&anyWide, 1u); }
  workgroupBarrier();
  var word = 0u;
  if (atomicLoad(&anyWide) == 0u) {
${codes(false)}
  } else {
${codes(true)}
  }`;
}

function valuesText(template: KvSealTileTemplate): string {
  const { format, shape, planeStride } = template;
  const w = writerOf(template);
  const d = shape.headDim;
  const layout = kvPageLayout(format, shape);
  const bits = format.valueBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const wordsPerPart = COUNT / perWord;
  const codes = (wide: boolean) =>
    Array.from(
      { length: wordsPerPart },
      (_, k) => `${wordText(w, bits, k, () => "steps", wide)}
  pages[head + ${layout.valueCodes}u + (quad * ${words}u + part * ${wordsPerPart}u + ${k}u) * 4u + token % 4u] = word;`,
    ).join("\n");
  return `${loadText(w, `fromToken + ${planeStride}u + kvHead * ${d / 2}u + part * 16u`, 2, format.rotated)}
${format.rotated ? rotateText(w, d, 2) : ""}
  var low = ${w.at("x", 0)};
  var high = low;
${w.each(COUNT, (i) => `low = min(low, ${w.at("x", i)}); high = max(high, ${w.at("x", i)});`)}
  let both = scaleAndZero(low, high, ${2 ** bits - 1}.0);
  if (eitherNotFinite(both)) { atomicOr(&status[slot], 2u); }
  let steps = stepsOf(both);
  let quad = group * 8u + token / 4u;
  pages[head + ${layout.valueMeta}u + (quad * ${d / COUNT}u + part) * 4u + token % 4u] = both;
  var word = 0u;
  if (!isWide(low, high, steps, ${2 ** bits - 1}.0)) {
${codes(false)}
  } else {
${codes(true)}
  }`;
}

const BINDINGS = `
@group(0) @binding(0) var<storage, read> source: array<vec4u>;
@group(0) @binding(1) var<storage, read> seals: array<vec4u>;
@group(0) @binding(2) var<storage, read> pageTable: array<u32>;
@group(0) @binding(3) var<storage, read_write> pages: array<u32>;
@group(0) @binding(4) var<storage, read_write> status: array<atomic<u32>>;`;

function placeText({ format, shape, maxPages, tokenStride, slotStride }: KvSealTemplate, token: string): string {
  const groups = shape.blockTokens / 32;
  return `  let entry = seals[params.first + wid.y / ${groups}u];
  let group = wid.y % ${groups}u;
  let slot = entry.y;
  let page = pageTable[slot * ${maxPages}u + entry.z / ${shape.blockTokens}u] * ${kvPageLayout(format, shape).page}u;
  let fromToken = slot * ${slotStride}u + (entry.x + group * 32u + ${token}) * ${tokenStride}u;`;
}

/** Bindings: source (chunkKv or residual), seals, pageTable, pages, status. Grid: 2 · KV heads, blocks · groups. */
export function kvSealTileWgsl(template: KvSealTileTemplate): string {
  const { format, shape, exchange } = template;
  const d = shape.headDim;
  return `requires immediate_address_space;
${exchange === "subgroup" ? "enable subgroups;\ndiagnostic(off, subgroup_uniformity);" : ""}
struct Step { negativeZero: f32, first: u32 }
var<immediate> params: Step;
${BINDINGS}
var<workgroup> tile: array<vec4f, ${d * TILE_VECTORS}>;
var<workgroup> anyWide: atomic<u32>;
var<workgroup> channelSteps: array<vec4f, ${d + d / 32}>;
${TO_HALF_WGSL}
${divisionText(template.fused)}
${CODES_WGSL}
@compute @workgroup_size(${d}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) tid: u32) {
  let part = tid % ${d / 32}u;
  let token = tid / ${d / 32}u;
  let kvHead = wid.x / 2u;
${placeText(template, "token")}
  let head = page + kvHead * ${kvPageLayout(format, shape).head}u;
  if ((wid.x & 1u) == 0u) {
${keysText(template)}
  } else {
${valuesText(template)}
  }
}`;
}

/** Key norms of rotated formats: two tokens a workgroup. Same bindings; grid: 16, blocks · groups. */
export function kvSealNormWgsl(template: KvSealTileTemplate): string {
  const { format, shape, exchange } = template;
  const elements = shape.kvHeads * shape.headDim;
  const vectors = elements / 8;
  const total =
    exchange === "subgroup"
      ? "  let totals = subgroupAdd(sums);"
      : `  lanes[lane] = sums;
  workgroupBarrier();
  var totals = vec2f();
  for (var other = 0u; other < ${NORM_THREADS}u; other++) { totals += lanes[other]; }`;
  return `requires immediate_address_space;
${exchange === "subgroup" ? "enable subgroups;\ndiagnostic(off, subgroup_uniformity);" : ""}
struct Step { negativeZero: f32, first: u32 }
var<immediate> params: Step;
${BINDINGS}
${exchange === "memory" ? `var<workgroup> lanes: array<vec2f, ${NORM_THREADS}>;` : ""}
${TO_HALF_WGSL}
fn squares(word: vec4u, sum: f32) -> f32 {
  let a = unpack2x16float(word.x);
  let b = unpack2x16float(word.y);
  let c = unpack2x16float(word.z);
  let d = unpack2x16float(word.w);
  return sum + ((dot(a, a) + dot(b, b)) + (dot(c, c) + dot(d, d)));
}
@compute @workgroup_size(${NORM_THREADS}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32) {
${placeText(template, "wid.x * 2u")}
  let first = fromToken / 4u;
  let second = first + ${template.tokenStride / 4}u;
  var sums = vec2f();
  for (var v = lane; v < ${vectors}u; v += ${NORM_THREADS}u) {
    let a = source[first + v];
    let b = source[second + v];
    sums = vec2f(squares(a, sums.x), squares(b, sums.y));
  }
${total}
  if (lane == 0u) {
    let norms = vec2u(toHalf(sqrt(totals.x / ${elements}.0)), toHalf(sqrt(totals.y / ${elements}.0)));
    pages[page + ${kvPageLayout(format, shape).norms}u + group * 16u + wid.x] = norms.x | (norms.y << 16u);
  }
}`;
}
