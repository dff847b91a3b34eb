/** Checks of what kernels take for granted of subgroups, f16 arithmetic and matrices. */
import { readBuffer, submitPass, uploadStorage } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { cachedKernel } from "./kernel-cache.ts";
import type { KernelCheck } from "./self-test.ts";
import { MATRIX_SIZE, matrixDialect } from "./subgroup-matrix.ts";

/** What output words are before the kernel runs: a NaN, as f32. */
const UNWRITTEN = 0x7fc0_dead;

/** Runs a kernel of one input and one output with one workgroup. @returns the output's words. */
async function runOnce(gpu: Gpu, label: string, code: string, input: ArrayBufferView, words: number) {
  const kernel = await cachedKernel(gpu, { label, code, bindings: ["read", "read_write"] });
  const source = uploadStorage(gpu, label, input);
  const output = uploadStorage(gpu, label, new Uint32Array(words).fill(UNWRITTEN));
  try {
    submitPass(gpu, (pass) => kernel.bind([source, output]).encode(pass, undefined, [1]));
    return new Uint32Array(await readBuffer(gpu, output));
  } finally {
    source.destroy();
    output.destroy();
  }
}

function difference(what: string, got: ArrayLike<number>, want: ArrayLike<number>): string | undefined {
  for (let index = 0; index < want.length; index++) {
    if (got[index] !== want[index]) return `${what} ${index}: ${got[index]}, must be ${want[index]}`;
  }
  return undefined;
}

/** Threads of the check of subgroups. */
const THREADS = 128;
const SUBGROUP_WORDS = 6;

/** Lane = thread mod size; shuffles, sums and prefix sums follow the lanes. */
export const SUBGROUP_WGSL = `enable subgroups;
@group(0) @binding(0) var<storage, read> input: array<u32>;
@group(0) @binding(1) var<storage, read_write> output: array<u32>;
@compute @workgroup_size(${THREADS})
fn main(
  @builtin(local_invocation_index) thread: u32,
  @builtin(subgroup_size) size: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let value = input[thread];
  let at = thread * ${SUBGROUP_WORDS}u;
  output[at] = size;
  output[at + 1u] = lane;
  output[at + 2u] = subgroupShuffleXor(value, 2u);
  output[at + 3u] = subgroupAdd(value);
  output[at + 4u] = subgroupExclusiveAdd(value);
  output[at + 5u] = subgroupMax(value);
}`;

function expectedLanes(values: Uint32Array, size: number): Uint32Array {
  const words = new Uint32Array(THREADS * SUBGROUP_WORDS);
  for (let thread = 0; thread < THREADS; thread++) {
    const first = thread - (thread % size);
    const group = Array.from(values.subarray(first, first + size));
    const sum = (list: number[]) => list.reduce((total, value) => total + value, 0);
    const shuffled = values[thread ^ 2] as number;
    const row = [size, thread - first, shuffled, sum(group), sum(group.slice(0, thread - first)), Math.max(...group)];
    words.set(row, thread * SUBGROUP_WORDS);
  }
  return words;
}

/** @param code another kernel, for tests of what a wrong one leads to. */
export function subgroupCheck(code: string): KernelCheck {
  return {
    variant: "subgroups",
    feature: "subgroups",
    async run(gpu) {
      const values = Uint32Array.from({ length: THREADS }, (_, i) => (i * 2654435761) >>> 20);
      const got = await runOnce(gpu, "self-test subgroups", code, values, THREADS * SUBGROUP_WORDS);
      return difference("word", got, expectedLanes(values, gpu.features.subgroupSize));
    },
  };
}

export const SUBGROUP_CHECK: KernelCheck = subgroupCheck(SUBGROUP_WGSL);

const HALF_PAIRS = 512;

/** Products, sums and fused products of halves, two at a time; nothing flushed, rounded to nearest even. */
export const HALF_WGSL = `enable f16;
@group(0) @binding(0) var<storage, read> input: array<u32>;
@group(0) @binding(1) var<storage, read_write> output: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) thread: u32) {
  for (var i = thread; i < ${HALF_PAIRS}u; i += 64u) {
    let a = bitcast<vec2<f16>>(input[2u * i]);
    let b = bitcast<vec2<f16>>(input[2u * i + 1u]);
    output[4u * i] = bitcast<u32>(a * b);
    output[4u * i + 1u] = bitcast<u32>(a + b);
    output[4u * i + 2u] = pack2x16float(unpack2x16float(input[2u * i]));
    let wide = vec2f(a);
    output[4u * i + 3u] = bitcast<u32>(wide.x + wide.y);
  }
}`;

/** Finite halves of all sizes, every fourth one subnormal: code words of 2 and 4 bits are read as such. */
function halfOperands(): Uint16Array {
  let state = 1;
  const next = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state >>> 16;
  };
  return Uint16Array.from({ length: 4 * HALF_PAIRS }, (_, i) => {
    const bits = next();
    // Exponents 7 … 22: no product overflows, many are subnormal.
    return i % 4 === 0 ? bits & 0x83ff : (bits & 0x83ff) | ((7 + ((bits >> 10) & 15)) << 10);
  });
}

function expectedHalves(input: Uint16Array): Uint32Array {
  const words = new Uint32Array(4 * HALF_PAIRS);
  const float = new Float32Array(words.buffer);
  for (let i = 0; i < HALF_PAIRS; i++) {
    const bits = Array.from(input.subarray(4 * i, 4 * i + 4));
    const [ax, ay, bx, by] = bits.map(halfToFloat) as [number, number, number, number];
    // Products and sums of halves are exact in f64, and in f32.
    words[4 * i] = floatToHalf(ax * bx) | (floatToHalf(ay * by) << 16);
    words[4 * i + 1] = floatToHalf(ax + bx) | (floatToHalf(ay + by) << 16);
    words[4 * i + 2] = (bits[0] as number) | ((bits[1] as number) << 16);
    float[4 * i + 3] = ax + ay;
  }
  return words;
}

export function halfCheck(code: string): KernelCheck {
  return {
    variant: "f16 arithmetic",
    feature: "shaderF16",
    async run(gpu) {
      const input = halfOperands();
      return difference(
        "word",
        await runOnce(gpu, "self-test f16", code, input, 4 * HALF_PAIRS),
        expectedHalves(input),
      );
    },
  };
}

export const HALF_CHECK: KernelCheck = halfCheck(HALF_WGSL);

const ELEMENTS = MATRIX_SIZE * MATRIX_SIZE;

/**
 * C = A·B + A·Bᵀ twice over, from storage and from workgroup memory: sums pass 2048, where f16 could not count on.
 * @param kind the dialect, as in `matrixDialect`.
 */
export function matrixCheckWgsl(kind: "device" | "emulated"): string {
  const dialect = matrixDialect(kind, "lane");
  const source = (array: string, offset: number, major: "row" | "column") =>
    ({ array, offset: `${offset}u`, stride: "2u", major }) as const;
  const vectors = ELEMENTS / 8;
  const products = ["input", "staged"].flatMap((array) => [
    dialect.loadLeft(`a_${array}`, source(array, 0, "row")),
    dialect.loadRight(`b_${array}`, source(array, vectors, "row")),
    dialect.loadRight(`t_${array}`, source(array, vectors, "column")),
    dialect.multiplyAccumulate("sum", `a_${array}`, `b_${array}`),
    dialect.multiplyAccumulate("sum", `a_${array}`, `t_${array}`),
  ]);
  const body = `
@group(0) @binding(0) var<storage, read> input: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> output: array<f32>;
var<workgroup> staged: array<vec4<u32>, ${2 * vectors}>;
@compute @workgroup_size(32)
fn main(@builtin(local_invocation_index) lane: u32) {
  staged[lane] = input[lane];
  staged[lane + 32u] = input[lane + 32u];
  workgroupBarrier();
  var sum: ${dialect.accumulator} = ${dialect.zero};
  ${products.join("\n  ")}
  ${dialect.store("output", "0u", `${MATRIX_SIZE}u`, "sum")}
}`;
  return `${dialect.directives}\n${body}\n${dialect.functions()}`;
}

/** Integers, so that every order of summation gives the same; some large. */
function matrixOperand(factor: number): number[] {
  return Array.from({ length: ELEMENTS }, (_, i) => ((i * factor) % 23) - 11 + (i % 29 === 0 ? 64 : 0));
}

function expectedProduct(a: readonly number[], b: readonly number[]): Float32Array {
  const at = (matrix: readonly number[], row: number, column: number) => matrix[row * MATRIX_SIZE + column] as number;
  return Float32Array.from({ length: ELEMENTS }, (_, i) => {
    const [row, column] = [Math.floor(i / MATRIX_SIZE), i % MATRIX_SIZE];
    let sum = 0;
    for (let k = 0; k < MATRIX_SIZE; k++) sum += at(a, row, k) * (at(b, k, column) + at(b, column, k));
    return 2 * sum;
  });
}

export function matrixCheck(code: string): KernelCheck {
  return {
    variant: "subgroup matrix",
    feature: "subgroupMatrix",
    async run(gpu) {
      const [a, b] = [matrixOperand(7), matrixOperand(13)];
      const input = Uint16Array.from([...a, ...b], floatToHalf);
      const words = await runOnce(gpu, "self-test matrix", code, input, ELEMENTS);
      return difference("sum", new Float32Array(words.buffer), expectedProduct(a, b));
    },
  };
}

export const MATRIX_CHECK: KernelCheck = matrixCheck(matrixCheckWgsl("device"));
