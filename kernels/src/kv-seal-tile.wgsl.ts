/**
 * WGSL of sealing for GPUs: a workgroup takes 32 tokens of one KV head, a thread 32 neighbouring channels of one token, and
 * everything between the load and the codes stays in registers.
 *
 * Threads are D: thread = token * (D / 32) + part. A group of V is one thread's registers. A group of K is a channel over
 * 32 tokens. Rotated formats divide K by norms over all heads: these are made beside V, in a kernel before K's, where
 * reading them costs little, since V keeps the arithmetic busy.
 */
import type { KvFormat, KvShape } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";
import type { KvSealTemplate } from "./kv-seal.wgsl.ts";
import {
  CODES_WGSL,
  COUNT,
  codesText,
  divideText,
  divisionText,
  type LaneExchange,
  loadText,
  reduceText,
  rotateText,
  tileWriter,
} from "./kv-seal-registers.wgsl.ts";
import { TO_HALF_WGSL } from "./kv-write.wgsl.ts";

/** What a kernel makes: all of a plain format; or of a rotated one first V and key norms, then K. */
export type SealTilePart = "all" | "values" | "keys";

export interface KvSealTileTemplate extends KvSealTemplate {
  readonly part: SealTilePart;
  readonly exchange: LaneExchange;
  /** Writes out what is done with the 32 values of a thread; otherwise loops, for drivers that compile slowly. */
  readonly unroll: boolean;
  /** Whether `fma` rounds once, which WGSL leaves open: then quotients are products with a reciprocal, corrected. */
  readonly fused: boolean;
}

/** Bytes of the immediates: the bits of -0.0, which the compiler must not know, and the first entry of the table. */
export const SEAL_TILE_IMMEDIATE_BYTES = 8;
/** The first of the immediates. */
export const NEGATIVE_ZERO_BITS = 0x8000_0000;

/** Whether the tiles hold the format: codes of 2 or 4 bits, and heads of 32, 64 or 128 channels. */
export function sealTileSupports(format: KvFormat, shape: KvShape): boolean {
  return format.keyBits < 16 && format.valueBits < 16 && [32, 64, 128].includes(shape.headDim);
}

/** Workgroups that make the 16 pairs of norms of a group: 32 threads a pair. */
function normGroups({ headDim }: KvShape): number {
  return 16 / (headDim / COUNT);
}

/** Workgroups in x; y is blocks · groups. */
export function sealTileGrid({ part, shape }: Pick<KvSealTileTemplate, "part" | "shape">): number {
  if (part === "all") return 2 * shape.kvHeads;
  return part === "keys" ? shape.kvHeads : normGroups(shape) + shape.kvHeads;
}

/** The parts of a format, in the order of their dispatches. */
export function sealTileParts(format: KvFormat): readonly SealTilePart[] {
  return format.rotated ? ["values", "keys"] : ["all"];
}

function keysText(template: KvSealTileTemplate): string {
  const { format, shape } = template;
  const w = tileWriter(template.exchange, template.unroll);
  const d = shape.headDim;
  const layout = kvPageLayout(format, shape);
  const bits = format.keyBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const wordsPerPart = COUNT / perWord;
  const store = (k: number) => `  {
    let w = part * ${wordsPerPart}u + ${k}u;
    let column = w / 4u;
    pages[head + ${layout.keyCodes}u + group * ${words * 32}u + column * 128u + token * min(4u, ${words}u - column * 4u) + w % 4u] = word;
  }`;
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
${codesText(w, bits, "atomicLoad(&anyWide) != 0u", (i) => `channelSteps[part * 33u + ${i}]`, store)}`;
}

function valuesText(template: KvSealTileTemplate): string {
  const { format, shape, planeStride } = template;
  const w = tileWriter(template.exchange, template.unroll);
  const d = shape.headDim;
  const layout = kvPageLayout(format, shape);
  const bits = format.valueBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const wordsPerPart = COUNT / perWord;
  const store = (k: number) =>
    `  pages[head + ${layout.valueCodes}u + (quad * ${words}u + part * ${wordsPerPart}u + ${k}u) * 4u + token % 4u] = word;`;
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
${codesText(w, bits, `isWide(low, high, steps, ${2 ** bits - 1}.0)`, () => "steps", store)}`;
}

/** Norms of two tokens' K over all heads, by 32 threads. */
function normsText({ format, shape, tokenStride, exchange }: KvSealTileTemplate): string {
  const elements = shape.kvHeads * shape.headDim;
  const total =
    exchange === "subgroup"
      ? "    let totals = subgroupAdd(sums);"
      : `    lanes[2u * tid] = sums.x;
    lanes[2u * tid + 1u] = sums.y;
    workgroupBarrier();
    var totals = vec2f();
    for (var other = tid - lane; other < tid - lane + 32u; other++) {
      totals += vec2f(lanes[2u * other], lanes[2u * other + 1u]);
    }`;
  return `    let lane = tid % 32u;
    let pair = wid.x * ${shape.headDim / COUNT}u + tid / 32u;
    let firstVector = (fromGroup + 2u * pair * ${tokenStride}u) / 4u;
    var sums = vec2f();
    for (var v = lane; v < ${elements / 8}u; v += 32u) {
      let a = source[firstVector + v];
      let b = source[firstVector + ${tokenStride / 4}u + v];
      sums = vec2f(squares(a, sums.x), squares(b, sums.y));
    }
${total}
    if (lane == 0u) {
      let norms = vec2u(toHalf(sqrt(totals.x / ${elements}.0)), toHalf(sqrt(totals.y / ${elements}.0)));
      pages[page + ${kvPageLayout(format, shape).norms}u + group * 16u + pair] = norms.x | (norms.y << 16u);
    }`;
}

const SQUARES_WGSL = `
fn squares(word: vec4u, sum: f32) -> f32 {
  let a = unpack2x16float(word.x);
  let b = unpack2x16float(word.y);
  let c = unpack2x16float(word.z);
  let d = unpack2x16float(word.w);
  return sum + ((dot(a, a) + dot(b, b)) + (dot(c, c) + dot(d, d)));
}`;

function bodyText(template: KvSealTileTemplate): string {
  const { part, format, shape } = template;
  const place = (kvHead: string) => `    let kvHead = ${kvHead};
    let head = page + kvHead * ${kvPageLayout(format, shape).head}u;`;
  if (part === "keys") return `${place("wid.x")}\n${keysText(template)}`;
  const [other, test, kvHead] =
    part === "all"
      ? [`${place("wid.x / 2u")}\n${keysText(template)}`, "(wid.x & 1u) == 0u", "wid.x / 2u"]
      : [normsText(template), `wid.x < ${normGroups(shape)}u`, `wid.x - ${normGroups(shape)}u`];
  return `  if (${test}) {
${other}
  } else {
${place(kvHead)}
${valuesText(template)}
  }`;
}

/** Bindings: source (chunkKv or residual), seals, pageTable, pages, status. Grid: `sealTileGrid`, blocks · groups. */
export function kvSealTileWgsl(template: KvSealTileTemplate): string {
  const { format, shape, maxPages, slotStride, tokenStride, part, exchange, fused } = template;
  const d = shape.headDim;
  const groups = shape.blockTokens / COUNT;
  return `requires immediate_address_space;
${exchange === "subgroup" ? "enable subgroups;\ndiagnostic(off, subgroup_uniformity);" : ""}
struct Step { negativeZero: f32, first: u32 }
var<immediate> params: Step;
@group(0) @binding(0) var<storage, read> source: array<vec4u>;
@group(0) @binding(1) var<storage, read> seals: array<vec4u>;
@group(0) @binding(2) var<storage, read> pageTable: array<u32>;
@group(0) @binding(3) var<storage, read_write> pages: array<u32>;
@group(0) @binding(4) var<storage, read_write> status: array<atomic<u32>>;
${
  part === "values"
    ? SQUARES_WGSL
    : `var<workgroup> partials: array<vec2f, ${(d / COUNT) * d}>;
var<workgroup> anyWide: atomic<u32>;
var<workgroup> channelSteps: array<vec4f, ${d + d / COUNT}>;`
}
${exchange === "memory" ? `var<workgroup> lanes: array<f32, ${d * COUNT}>;` : ""}
${TO_HALF_WGSL}
${divisionText(fused)}
${CODES_WGSL}
@compute @workgroup_size(${d}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) tid: u32) {
  let part = tid % ${d / COUNT}u;
  let token = tid / ${d / COUNT}u;
  let entry = seals[params.first + wid.y / ${groups}u];
  let group = wid.y % ${groups}u;
  let slot = entry.y;
  let page = pageTable[slot * ${maxPages}u + entry.z / ${shape.blockTokens}u] * ${kvPageLayout(format, shape).page}u;
  let fromGroup = slot * ${slotStride}u + (entry.x + group * 32u) * ${tokenStride}u;
  let fromToken = fromGroup + token * ${tokenStride}u;
${bodyText(template)}
}`;
}
