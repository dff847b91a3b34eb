/**
 * What decode attention on matrices asks of 32 threads: products of 8-bit integer matrices (16 × 32 by 32 × 8, exact
 * 32-bit sums) and exchange of values between the threads. Two texts of the same operations: the device's subgroup matrices, or
 * plain WGSL that runs on any driver, for tests.
 *
 * The workgroup is those 32 threads; all of them must reach each statement. Matrices lie in workgroup arrays of
 * `vec4<u32>`: 16 signed bytes, offsets and strides count vec4s.
 */

/** Threads that own a matrix, and the whole workgroup. */
export const DECODE_MATRIX_THREADS = 32;

/** Depth of one product: bytes of an operand's line. */
export const BYTE_MATRIX_DEPTH = 32;

/** An operand: lines of 32 bytes. */
export interface ByteMatrixSource {
  readonly array: string;
  /** Text: index of the first vec4. */
  readonly offset: string;
  /** Vec4s from one line to the next. */
  readonly stride: number;
}

/** Lines of a factor operand: columns of the right matrix. */
export const FACTOR_LINES = 8;

/** Bytes with a sign (sums i32) or without (sums u32). */
export type ByteType = "i8" | "u8";

/** Writes the statements of one kernel; make a new one for each kernel text. */
export interface DecodeMatrixDialect {
  readonly directives: string;
  /** Expression: 16 × 8 sums of zero. */
  zero(type: ByteType): string;
  /** Statement: `name` becomes 16 lines of codes. The memory must stay as it is until its last use. */
  loadCodes(type: ByteType, name: string, source: ByteMatrixSource): string;
  /** Statement: `name` becomes 8 lines of factors. */
  loadFactors(type: ByteType, name: string, source: ByteMatrixSource): string;
  multiplyAccumulate(type: ByteType, sum: string, codes: string, factors: string): string;
  /** Statement: the sums go to a workgroup `array<vec4<u32>>`: a row of 8 for each line of codes, `stride` vec4s apart. */
  store(type: ByteType, array: string, offset: string, stride: number, sum: string): string;
  /**
   * Module-scope functions: laneXor4 (vec4u), laneXor, laneRead (u32), laneSum (f32), laneMax (u32), laneAny (bool); call
   * it last. The module's immediate `params.one` is 1: loops that a driver must not unroll multiply their bound by it.
   */
  functions(): string;
}

const SUM_TYPE = { i8: "i32", u8: "u32" } as const;

function deviceDialect(): DecodeMatrixDialect {
  const load = (type: string, name: string, { array, offset, stride }: ByteMatrixSource) =>
    `let ${name} = subgroupMatrixLoad<${type}>(&${array}, ${offset}, ${stride}u);`;
  return {
    directives: `enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);`,
    zero: (type) => `subgroup_matrix_result<${SUM_TYPE[type]}, 8, 16>()`,
    loadCodes: (type, name, source) => load(`subgroup_matrix_left<${type}, 32, 16>, row_major`, name, source),
    loadFactors: (type, name, source) => load(`subgroup_matrix_right<${type}, 8, 32>, col_major`, name, source),
    multiplyAccumulate: (_type, sum, codes, factors) =>
      `${sum} = subgroupMatrixMultiplyAccumulate(${codes}, ${factors}, ${sum});`,
    store: (_type, array, offset, stride, sum) =>
      `subgroupMatrixStore<row_major>(&${array}, ${offset}, ${sum}, ${stride}u);`,
    functions: () => `
fn laneXor4(x: vec4u, mask: u32, lane: u32) -> vec4u { return subgroupShuffleXor(x, mask); }
fn laneXor(x: u32, mask: u32, lane: u32) -> u32 { return subgroupShuffleXor(x, mask); }
fn laneRead(x: u32, source: u32, lane: u32) -> u32 { return subgroupShuffle(x, source); }
fn laneSum(x: f32, lane: u32) -> f32 { return subgroupAdd(x); }
fn laneMax(x: u32, lane: u32) -> u32 { return subgroupMax(x); }
fn laneAny(x: bool, lane: u32) -> bool { return subgroupAny(x); }`,
  };
}

/** A thread holds every 32nd of the sums. */
function emulatedDialect(): DecodeMatrixDialect {
  const sources = new Map<string, ByteMatrixSource>();
  const functions = new Map<string, string>();
  const operand = (_type: ByteType, name: string, source: ByteMatrixSource) => {
    sources.set(name, source);
    return `let ${name} = ${source.offset};`;
  };
  return {
    directives: "",
    zero: (type) => `array<${SUM_TYPE[type]}, 4>()`,
    loadCodes: operand,
    loadFactors: operand,
    multiplyAccumulate(type, sum, left, right) {
      const [a, b] = [left, right].map((name) => sources.get(name) as ByteMatrixSource);
      const key = `${type}_${a?.array}_${a?.stride}_${b?.array}_${b?.stride}`;
      const sums = `array<${SUM_TYPE[type]}, 4>`;
      functions.set(
        `product ${key}`,
        `fn emulatedProduct_${key}(sums: ${sums}, a: u32, b: u32, lane: u32) -> ${sums} {
  var result = sums;
  for (var i = 0u; i < 4u * params.one; i++) {
    let e = lane + 32u * i;
    let row = a + (e / 8u) * ${a?.stride}u; let column = b + (e % 8u) * ${b?.stride}u;
    var sum = result[i];
    for (var k = 0u; k < 8u * params.one; k++) { sum += dot4${type === "i8" ? "I" : "U"}8Packed(${a?.array}[row + (k >> 2u)][k & 3u], ${b?.array}[column + (k >> 2u)][k & 3u]); }
    result[i] = sum;
  }
  return result;
}`,
      );
      return `${sum} = emulatedProduct_${key}(${sum}, ${left}, ${right}, lane);`;
    },
    store(type, array, offset, stride, sum) {
      functions.set(
        `store ${type}_${array}_${stride}`,
        `fn emulatedStore_${type}_${array}_${stride}(offset: u32, sums: array<${SUM_TYPE[type]}, 4>, lane: u32) {
  var values = sums;
  for (var i = 0u; i < 4u * params.one; i++) {
    let e = lane + 32u * i; let column = e % 8u;
    ${array}[offset + (e / 8u) * ${stride}u + (column >> 2u)][column & 3u] = bitcast<u32>(values[i]);
  }
}`,
      );
      return `emulatedStore_${type}_${array}_${stride}(${offset}, ${sum}, lane);`;
    },
    functions: () => `
var<workgroup> exchange: array<vec4u, 32>;
fn give(x: vec4u, lane: u32) {
  workgroupBarrier();
  exchange[lane] = x;
  workgroupBarrier();
}
fn laneXor4(x: vec4u, mask: u32, lane: u32) -> vec4u { give(x, lane); return exchange[lane ^ mask]; }
fn laneXor(x: u32, mask: u32, lane: u32) -> u32 { give(vec4u(x), lane); return exchange[lane ^ mask].x; }
fn laneRead(x: u32, source: u32, lane: u32) -> u32 { give(vec4u(x), lane); return exchange[source].x; }
fn laneSum(x: f32, lane: u32) -> f32 {
  give(vec4u(bitcast<u32>(x)), lane);
  var sum = 0.0;
  for (var i = 0u; i < 32u * params.one; i++) { sum += bitcast<f32>(exchange[i].x); }
  return sum;
}
fn laneMax(x: u32, lane: u32) -> u32 {
  give(vec4u(x), lane);
  var best = 0u;
  for (var i = 0u; i < 32u * params.one; i++) { best = max(best, exchange[i].x); }
  return best;
}
var<workgroup> anyLane: u32;
fn laneAny(x: bool, lane: u32) -> bool {
  workgroupBarrier();
  if (lane == 0u) { anyLane = 0u; }
  workgroupBarrier();
  if (x) { anyLane = 1u; }
  return workgroupUniformLoad(&anyLane) == 1u;
}
${[...functions.values()].join("\n")}`,
  };
}

/** @param kind `device` needs 8-bit matrices of 16 × 8 × 32 and subgroups of 32; `emulated` runs anywhere, slowly. */
export function decodeMatrixDialect(kind: "device" | "emulated"): DecodeMatrixDialect {
  return kind === "device" ? deviceDialect() : emulatedDialect();
}
