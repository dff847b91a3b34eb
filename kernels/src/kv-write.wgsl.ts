/**
 * WGSL of rotary embedding and KV write: turns q in place, turns K, rounds K and V to f16 and stores them as pairs.
 *
 * One thread takes four channels of one head (two pairs of the rotation) of one row.
 */
import type { KvShape } from "./kv-format.ts";

/** Threads of a workgroup. */
export const WRITE_THREADS = 64;

export interface KvWriteTemplate {
  readonly shape: KvShape;
  readonly heads: number;
  readonly ropeDim: number;
  readonly ropeLayout: "interleaved" | "half";
  /** Prefill rows go to chunkKv and, where flagged, to the residual; decode rows to the residual only. */
  readonly phase: "prefill" | "decode";
}

/**
 * Rounding to f16 in integers: to nearest even, the same bits on every driver (pack2x16float leaves the rounding to the
 * implementation). Beyond 65519 it gives infinity.
 */
export const TO_HALF_WGSL = `
fn toHalf(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  let sign = (bits >> 16u) & 0x8000u;
  let magnitude = bits & 0x7fffffffu;
  let normal = (magnitude + 0xfffu + ((magnitude >> 13u) & 1u) - 0x38000000u) >> 13u;
  // Below 2^-14: the mantissa with its leading one, shifted to multiples of 2^-24.
  let exponent = max(magnitude >> 23u, 94u);
  let shift = min(126u - exponent, 31u);
  let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  let kept = select(0u, mantissa >> shift, magnitude >= 0x33000000u);
  let rest = mantissa & ((1u << shift) - 1u);
  let tie = 1u << (shift - 1u);
  let up = select(0u, 1u, rest > tie || (rest == tie && (kept & 1u) == 1u));
  let subnormal = kept + select(0u, up, magnitude >= 0x33000000u);
  let finite = select(normal, subnormal, magnitude < 0x38800000u);
  let large = select(finite, 0x7c00u, magnitude >= 0x477ff000u);
  return sign | select(large, 0x7e00u, magnitude > 0x7f800000u);
}
fn halfNotFinite(bits: u32) -> bool { return (bits & 0x7c00u) == 0x7c00u; }`;

/** Bindings: qkv, ropeTable, rows, residual, status, [prefill: chunkKv]. Grid: ceil(threads / 64) x, rows y. */
export function kvWriteWgsl({ shape, heads, ropeDim, ropeLayout, phase }: KvWriteTemplate): string {
  const { kvHeads, headDim, residualTokens } = shape;
  const width = (heads + 2 * kvHeads) * headDim;
  const quads = headDim / 4;
  const row = (kvHeads * headDim) / 2;
  const prefill = phase === "prefill";
  const half = ropeLayout === "half";
  const store = `
fn store(row: u32, position: u32, slot: u32, keep: bool, plane: u32, word: u32, value: u32) {
${prefill ? `  chunkKv[(row * 2u + plane) * ${row}u + word] = value;` : ""}
  if (keep) { residual[((slot * 2u + plane) * ${residualTokens}u + position % ${residualTokens}u) * ${row}u + word] = value; }
}`;
  return `requires immediate_address_space;
@group(0) @binding(0) var<storage, read_write> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> ropeTable: array<vec2f>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read_write> residual: array<u32>;
@group(0) @binding(4) var<storage, read_write> status: array<atomic<u32>>;
${prefill ? "@group(0) @binding(5) var<storage, read_write> chunkKv: array<u32>;" : ""}
struct Step { firstRow: u32, step: u32 }
var<immediate> params: Step;
${TO_HALF_WGSL}
${store}
// The same roundings as in kv-query-rope.wgsl.ts: K of a token has the same bits, whichever kernel turns it.
fn turn(a: f32, b: f32, cs: vec2f) -> vec2f { return vec2f(fma(a, cs.x, -(b * cs.y)), fma(b, cs.x, a * cs.y)); }
@compute @workgroup_size(${WRITE_THREADS}) fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= ${(heads + 2 * kvHeads) * quads}u) { return; }
  let row = params.firstRow + id.y;
  let entry = rows[row];
  let position = entry.x + params.step;
  let slot = entry.y;
  let keep = (entry.z & 1u) == 1u;
  let head = id.x / ${quads}u;
  let quad = id.x % ${quads}u;
  // Two pairs of channels: (a, a+1) and (b, b+1).
  var a = quad * 4u;
  var b = a + 2u;
  let turned = a < ${ropeDim}u && head < ${heads + kvHeads}u;
${half ? `  if (turned) { a = quad * 2u; b = a + ${ropeDim / 2}u; }` : ""}
  let base = row * ${width}u + head * ${headDim}u;
  var x = vec2f(qkv[base + a], qkv[base + a + 1u]);
  var y = vec2f(qkv[base + b], qkv[base + b + 1u]);
  if (turned) {
    let cs0 = ropeTable[position * ${ropeDim / 2}u + quad * 2u];
    let cs1 = ropeTable[position * ${ropeDim / 2}u + quad * 2u + 1u];
${
  half
    ? `    let first = turn(x.x, y.x, cs0);
    let second = turn(x.y, y.y, cs1);
    x = vec2f(first.x, second.x);
    y = vec2f(first.y, second.y);`
    : `    x = turn(x.x, x.y, cs0);
    y = turn(y.x, y.y, cs1);`
}
  }
  if (head < ${heads}u) {
    qkv[base + a] = x.x; qkv[base + a + 1u] = x.y;
    qkv[base + b] = y.x; qkv[base + b + 1u] = y.y;
    return;
  }
  let plane = select(0u, 1u, head >= ${heads + kvHeads}u);
  let kvHead = head - ${heads}u - plane * ${kvHeads}u;
  let h = vec4u(toHalf(x.x), toHalf(x.y), toHalf(y.x), toHalf(y.y));
  if (halfNotFinite(h.x) || halfNotFinite(h.y) || halfNotFinite(h.z) || halfNotFinite(h.w)) {
    atomicOr(&status[slot], plane + 1u);
  }
  let word = kvHead * ${headDim / 2}u;
  store(row, position, slot, keep, plane, word + a / 2u, h.x | (h.y << 16u));
  store(row, position, slot, keep, plane, word + b / 2u, h.z | (h.w << 16u));
}`;
}
