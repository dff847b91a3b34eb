/**
 * WGSL of sealing: reads 32 tokens of one KV head as f16, rotates them where the format says so, quantizes, and writes
 * the group into its page. Grid: blocks * groups of 32 tokens, KV heads, 2 (K, V).
 *
 * A thread owns a token for the rotation and for packing; for K's scales it owns channels.
 */
import type { KvFormat, KvShape } from "./kv-format.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";
import { TO_HALF_WGSL } from "./kv-write.wgsl.ts";

export interface KvSealTemplate {
  readonly format: KvFormat;
  readonly shape: KvShape;
  readonly maxPages: number;
  /** Words from a token to the next, and from its K to its V. */
  readonly tokenStride: number;
  readonly planeStride: number;
  /** Words from one slot to the next; 0 where the source is not by slot. */
  readonly slotStride: number;
}

function quantizeText(name: string, bits: number): string {
  if (bits === 16) return "";
  return `
fn scaleOf${name}(low: f32, high: f32) -> u32 { return toHalf(divide(high - low, ${2 ** bits - 1}.0)); }
fn code${name}(x: f32, scale: f32, zero: f32) -> u32 {
  if (scale == 0.0) { return 0u; }
  return u32(clamp(round(divide(x - zero, scale)), 0.0, ${2 ** bits - 1}.0));
}`;
}

function keysText(template: KvSealTemplate): string {
  const { format, shape } = template;
  const d = shape.headDim;
  const layout = kvPageLayout(format, shape);
  const bits = format.keyBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const put = (value: string) => `    {
      let column = w / 4u;
      pages[page + kvHead * ${layout.head}u + ${layout.keyCodes}u + group * ${words * 32}u + column * 128u + token * min(4u, ${words}u - column * 4u) + w % 4u] = ${value};
    }`;
  if (bits === 16) {
    return `  for (var w = 0u; w < ${words}u * params.one; w++) {
    let value = source[begin + w];
    flag(value, slot, 1u);
${put("value")}
  }`;
  }
  return `  loadRow(begin, token, slot, 1u);
${
  format.rotated
    ? `  let norm = keyNorm(fromToken);
  if (kvHead == 0u) { norms[token] = norm; }
  let divisor = unpack2x16float(norm).x;
  rotateRow(token);
  for (var c = 0u; c < ${d}u * params.one; c++) {
    let at = token * ${d + 1}u + c;
    tile[at] = select(divide(tile[at], divisor), 0.0, divisor == 0.0);
  }`
    : ""
}
  workgroupBarrier();
${
  format.rotated
    ? `  if (kvHead == 0u && (token & 1u) == 0u) {
    pages[page + ${layout.norms}u + (group * 32u + token) / 2u] = norms[token] | (norms[token + 1u] << 16u);
    if (halfNotFinite(norms[token]) || halfNotFinite(norms[token + 1u])) { atomicOr(&status[slot], 1u); }
  }`
    : ""
}
  for (var c = token; c < ${d}u * params.one; c += 32u) {
    var low = tile[c];
    var high = low;
    for (var t = 1u; t < 32u * params.one; t++) {
      let x = tile[t * ${d + 1}u + c];
      low = min(low, x);
      high = max(high, x);
    }
    let scale = scaleOfKey(low, high);
    let zero = toHalf(low);
    if (halfNotFinite(scale) || halfNotFinite(zero)) { atomicOr(&status[slot], 1u); }
    let both = scale | (zero << 16u);
    channelScale[c] = unpack2x16float(both);
    let inWord = c % ${perWord}u;
    pages[page + kvHead * ${layout.head}u + ${layout.keyMeta}u + group * ${d}u + c - inWord + (inWord % ${perWord / 2}u) * 2u + inWord / ${perWord / 2}u] = both;
  }
  workgroupBarrier();
  for (var w = 0u; w < ${words}u * params.one; w++) {
    var value = 0u;
    for (var j = 0u; j < ${perWord}u * params.one; j++) {
      let c = w * ${perWord}u + j;
      let sz = channelScale[c];
      value |= codeKey(tile[token * ${d + 1}u + c], sz.x, sz.y) << (j * ${bits}u);
    }
${put("value")}
  }`;
}

function valuesText(template: KvSealTemplate): string {
  const { format, shape } = template;
  const d = shape.headDim;
  const layout = kvPageLayout(format, shape);
  const bits = format.valueBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const codes = `page + kvHead * ${layout.head}u + ${layout.valueCodes}u + (((group * 32u + token) / 4u) * ${words}u + w) * 4u + token % 4u`;
  if (bits === 16) {
    return `  for (var w = 0u; w < ${words}u * params.one; w++) {
    let value = source[begin + w];
    flag(value, slot, 2u);
    pages[${codes}] = value;
  }`;
  }
  return `  loadRow(begin, token, slot, 2u);
${format.rotated ? "  rotateRow(token);" : ""}
  for (var part = 0u; part < ${d / 32}u * params.one; part++) {
    let row = token * ${d + 1}u + part * 32u;
    var low = tile[row];
    var high = low;
    for (var i = 1u; i < 32u * params.one; i++) {
      low = min(low, tile[row + i]);
      high = max(high, tile[row + i]);
    }
    let scale = scaleOfValue(low, high);
    let zero = toHalf(low);
    if (halfNotFinite(scale) || halfNotFinite(zero)) { atomicOr(&status[slot], 2u); }
    let both = scale | (zero << 16u);
    let sz = unpack2x16float(both);
    pages[page + kvHead * ${layout.head}u + ${layout.valueMeta}u + (((group * 32u + token) / 4u) * ${d / 32}u + part) * 4u + token % 4u] = both;
    for (var k = 0u; k < ${32 / perWord}u * params.one; k++) {
      let w = part * ${32 / perWord}u + k;
      var value = 0u;
      for (var j = 0u; j < ${perWord}u * params.one; j++) {
        value |= codeValue(tile[row + k * ${perWord}u + j], sz.x, sz.y) << (j * ${bits}u);
      }
      pages[${codes}] = value;
    }
  }`;
}

function rowText({ format, shape }: KvSealTemplate): string {
  const d = shape.headDim;
  const words = (shape.kvHeads * d) / 2;
  const rotation = `
// Orthonormal Hadamard transform of a token's row, stages 1, 2, 4, ...
fn rotateRow(token: u32) {
  let row = token * ${d + 1}u;
  for (var stride = 1u; stride < ${d}u * params.one; stride *= 2u) {
    for (var i = 0u; i < ${d / 2}u * params.one; i++) {
      let at = row + (i / stride) * 2u * stride + i % stride;
      let a = tile[at];
      let b = tile[at + stride];
      tile[at] = a + b;
      tile[at + stride] = a - b;
    }
  }
  for (var i = 0u; i < ${d}u * params.one; i++) { tile[row + i] *= ${Math.fround(1 / Math.sqrt(d))}; }
}
// f16 bits of sqrt(mean of squares) of a token's K over all heads.
fn keyNorm(begin: u32) -> u32 {
  var sum = 0.0;
  for (var w = 0u; w < ${words}u * params.one; w++) {
    let x = unpack2x16float(source[begin + w]);
    sum = fma(x.x, x.x, sum);
    sum = fma(x.y, x.y, sum);
  }
  return toHalf(sqrt(sum / ${shape.kvHeads * d}.0));
}`;
  return `
fn loadRow(begin: u32, token: u32, slot: u32, bit: u32) {
  for (var w = 0u; w < ${d / 2}u * params.one; w++) {
    let value = source[begin + w];
    flag(value, slot, bit);
    let x = unpack2x16float(value);
    tile[token * ${d + 1}u + 2u * w] = x.x;
    tile[token * ${d + 1}u + 2u * w + 1u] = x.y;
  }
}${format.rotated ? rotation : ""}`;
}

/** Bindings: source (chunkKv or residual), seals, pageTable, pages, status. */
export function kvSealWgsl(template: KvSealTemplate): string {
  const { format, shape, maxPages, tokenStride, slotStride } = template;
  const d = shape.headDim;
  const groups = shape.blockTokens / 32;
  const quantized = format.keyBits < 16 || format.valueBits < 16;
  return `requires immediate_address_space;
// one is 1: loops that the driver must not unroll multiply their bound by it.
struct Step { one: u32, first: u32 }
var<immediate> params: Step;
@group(0) @binding(0) var<storage, read> source: array<u32>;
@group(0) @binding(1) var<storage, read> seals: array<vec4u>;
@group(0) @binding(2) var<storage, read> pageTable: array<u32>;
@group(0) @binding(3) var<storage, read_write> pages: array<u32>;
@group(0) @binding(4) var<storage, read_write> status: array<atomic<u32>>;
${quantized ? `var<workgroup> tile: array<f32, ${32 * (d + 1)}>;\nvar<workgroup> channelScale: array<vec2f, ${d}>;` : ""}
${format.rotated ? "var<workgroup> norms: array<u32, 32>;" : ""}
${TO_HALF_WGSL}
// Drivers may divide a unit or two off; one exact remainder makes it the correctly rounded quotient, as on a CPU.
fn divide(a: f32, b: f32) -> f32 {
  let q = a / b;
  return fma(fma(-q, b, a), 1.0 / b, q);
}
fn flag(word: u32, slot: u32, bit: u32) {
  if (halfNotFinite(word) || halfNotFinite(word >> 16u)) { atomicOr(&status[slot], bit); }
}
${quantizeText("Key", format.keyBits)}
${quantizeText("Value", format.valueBits)}
${quantized ? rowText(template) : ""}
@compute @workgroup_size(32) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) token: u32) {
  let entry = seals[params.first + wid.x / ${groups}u];
  let group = wid.x % ${groups}u;
  let kvHead = wid.y;
  let slot = entry.y;
  let page = pageTable[slot * ${maxPages}u + entry.z / ${shape.blockTokens}u] * ${kvPageLayout(format, shape).page}u;
  let fromToken = slot * ${slotStride}u + (entry.x + group * 32u + token) * ${tokenStride}u;
  if (wid.z == 0u) {
    let begin = fromToken + kvHead * ${d / 2}u;
${keysText(template)}
  } else {
    let begin = fromToken + ${template.planeStride}u + kvHead * ${d / 2}u;
${valuesText(template)}
  }
}`;
}
