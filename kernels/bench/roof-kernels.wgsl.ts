/** Kernels that do one thing only, to see how fast the device does it. */
import { MATRIX_SIZE, matrixDialect } from "../src/subgroup-matrix.ts";

/** 8 × 4 chains of 256 multiply-adds a thread. */
export const MULTIPLY_ADD_CODE = `
@group(0) @binding(0) var<storage, read_write> output: array<vec4f>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3u) {
  var a = vec4f(f32(id.x)); var b = a + 1.0; var c = a + 2.0; var d = a + 3.0;
  var e = a + 4.0; var f = a + 5.0; var g = a + 6.0; var h = a + 7.0;
  let m = vec4f(0.999); let n = vec4f(0.001);
  for (var i = 0u; i < 256u; i++) {
    a = fma(a, m, n); b = fma(b, m, n); c = fma(c, m, n); d = fma(d, m, n);
    e = fma(e, m, n); f = fma(f, m, n); g = fma(g, m, n); h = fma(h, m, n);
  }
  output[id.x] = a + b + c + d + e + f + g + h;
}`;

/** A workgroup reads 64 × 256 vec4s; what they add up to is all but never written, but the compiler cannot know. */
export const READ_CODE = `
@group(0) @binding(0) var<storage, read> input: array<vec4u>;
@group(0) @binding(1) var<storage, read_write> output: array<u32>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let base = group.x * 16384u + thread;
  var sum = vec4u();
  for (var i = 0u; i < 8u; i++) {
    let at = base + i * 2048u;
    let a = input[at]; let b = input[at + 256u]; let c = input[at + 512u]; let d = input[at + 768u];
    let e = input[at + 1024u]; let f = input[at + 1280u]; let g = input[at + 1536u]; let h = input[at + 1792u];
    sum += ((a ^ b) + (c ^ d)) ^ ((e ^ f) + (g ^ h));
  }
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x9e3779b9u) { output[group.x] = sum.x; }
}`;

/** A workgroup copies 4 × 256 vec4s. */
export const COPY_CODE = `
@group(0) @binding(0) var<storage, read> input: array<vec4u>;
@group(0) @binding(1) var<storage, read_write> output: array<vec4u>;
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let at = group.x * 1024u + thread;
  let a = input[at]; let b = input[at + 256u]; let c = input[at + 512u]; let d = input[at + 768u];
  output[at] = a; output[at + 256u] = b; output[at + 512u] = c; output[at + 768u] = d;
}`;

/** Products of each pair of operands. */
export const MATRIX_STEPS = 256;
/** Operands of each side that a subgroup keeps. */
export const MATRIX_SIDE = 4;

/** Each subgroup keeps 4 × 4 sums and multiplies the same operands again and again. */
export function matrixCode(): string {
  const dialect = matrixDialect("device");
  const sides = Array.from({ length: MATRIX_SIDE }, (_, index) => index);
  const source = (array: string, index: number, major: "row" | "column") => {
    return { array, offset: `${index * MATRIX_SIZE * 2}u`, stride: "2u", major } as const;
  };
  const body = [
    ...sides.map((index) => dialect.loadLeft(`left${index}`, source("operands", index, "row"))),
    ...sides.map((index) => dialect.loadRight(`right${index}`, source("operands", index + MATRIX_SIDE, "column"))),
    ...sides.flatMap((i) => sides.map((j) => `var sum${i}_${j}: ${dialect.accumulator} = ${dialect.zero};`)),
    `for (var step = 0u; step < ${MATRIX_STEPS}u; step++) {`,
    ...sides.flatMap((i) => sides.map((j) => dialect.multiplyAccumulate(`sum${i}_${j}`, `left${i}`, `right${j}`))),
    "}",
    ...sides.flatMap((i) =>
      sides.map((j) =>
        dialect.store("output", `base + ${(i * MATRIX_SIDE + j) * MATRIX_SIZE ** 2}u`, "16u", `sum${i}_${j}`),
      ),
    ),
  ];
  return `${dialect.directives}
@group(0) @binding(0) var<storage, read> operands: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> output: array<f32>;
@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
  let base = (group.x * 4u + thread / 32u) * ${MATRIX_SIDE ** 2 * MATRIX_SIZE ** 2}u;
  ${body.join("\n  ")}
}
${dialect.functions()}`;
}
