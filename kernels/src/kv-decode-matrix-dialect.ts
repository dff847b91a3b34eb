/**
 * What decode attention on matrices asks of 32 threads: products of 8-bit integer matrices (16 × 32 by 32 × 16, exact
 * 32-bit sums) and exchange of values between the threads. Two texts of the same operations: the device's subgroup matrices, or
 * plain WGSL that runs on any driver, for tests.
 *
 * The workgroup is those 32 threads; all of them must reach each statement. Matrices lie in workgroup arrays of
 * `vec4<u32>`: 16 signed bytes each, offsets and strides count vec4s.
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

/**
 * Which side the folded factors take. `wide`: 16 factors are rows of the left matrix, codes its right side; sums lie
 * [factor][code]. `narrow`: 8 factors are columns of the right matrix; sums lie [code][factor].
 */
export type FactorSide = "wide" | "narrow";

/** Writes the statements of one kernel; make a new one for each kernel text. */
export interface DecodeMatrixDialect {
  readonly directives: string;
  /** Lines of a factor operand: 16 or 8. */
  readonly factors: number;
  /** Expression: 16 × factors sums (i32) of zero. */
  readonly zero: string;
  /** Statement: `name` becomes 16 lines of codes. The memory must stay as it is until its last use. */
  loadCodes(name: string, source: ByteMatrixSource): string;
  /** Statement: `name` becomes `factors` lines of factors. */
  loadFactors(name: string, source: ByteMatrixSource): string;
  multiplyAccumulate(sum: string, codes: string, factors: string): string;
  /** Statement: the sums go to a workgroup `array<vec4<u32>>`, `stride` vec4s from row to row. */
  store(array: string, offset: string, stride: number, sum: string): string;
  /**
   * Module-scope functions: laneXor4 (vec4u), laneXor, laneRead (u32), laneSum (f32), laneMax (u32); call it last. The
   * module's immediate `params.one` is 1: loops that a driver must not unroll multiply their bound by it.
   */
  functions(): string;
}

function deviceDialect(side: FactorSide): DecodeMatrixDialect {
  const wide = side === "wide";
  const result = wide ? "subgroup_matrix_result<i32, 16, 16>" : "subgroup_matrix_result<i32, 8, 16>";
  const left = "subgroup_matrix_left<i8, 32, 16>, row_major";
  const right = (columns: number) => `subgroup_matrix_right<i8, ${columns}, 32>, col_major`;
  const load = (type: string, name: string, { array, offset, stride }: ByteMatrixSource) =>
    `let ${name} = subgroupMatrixLoad<${type}>(&${array}, ${offset}, ${stride}u);`;
  return {
    directives: `enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);`,
    factors: wide ? 16 : 8,
    zero: `${result}()`,
    loadCodes: (name, source) => load(wide ? right(16) : left, name, source),
    loadFactors: (name, source) => load(wide ? left : right(8), name, source),
    multiplyAccumulate: (sum, codes, factors) =>
      `${sum} = subgroupMatrixMultiplyAccumulate(${wide ? `${factors}, ${codes}` : `${codes}, ${factors}`}, ${sum});`,
    store: (array, offset, stride, sum) => `subgroupMatrixStore<row_major>(&${array}, ${offset}, ${sum}, ${stride}u);`,
    functions: () => `
fn laneXor4(x: vec4u, mask: u32, lane: u32) -> vec4u { return subgroupShuffleXor(x, mask); }
fn laneXor(x: u32, mask: u32, lane: u32) -> u32 { return subgroupShuffleXor(x, mask); }
fn laneRead(x: u32, source: u32, lane: u32) -> u32 { return subgroupShuffle(x, source); }
fn laneSum(x: f32, lane: u32) -> f32 { return subgroupAdd(x); }
fn laneMax(x: u32, lane: u32) -> u32 { return subgroupMax(x); }`,
  };
}

/** A thread holds every 32nd of the sums. */
function emulatedDialect(side: FactorSide): DecodeMatrixDialect {
  const factors = side === "wide" ? 16 : 8;
  const count = factors / 2;
  const columns = side === "wide" ? 16 : 8;
  const sources = new Map<string, ByteMatrixSource>();
  const functions = new Map<string, string>();
  const operand = (name: string, source: ByteMatrixSource) => {
    sources.set(name, source);
    return `let ${name} = ${source.offset};`;
  };
  return {
    directives: "",
    factors,
    zero: `array<i32, ${count}>()`,
    loadCodes: operand,
    loadFactors: operand,
    multiplyAccumulate(sum, codes, factorName) {
      const [left, right] = side === "wide" ? [factorName, codes] : [codes, factorName];
      const [a, b] = [left, right].map((name) => sources.get(name) as ByteMatrixSource);
      const key = `${a?.array}_${a?.stride}_${b?.array}_${b?.stride}`;
      functions.set(
        `product ${key}`,
        `fn emulatedProduct_${key}(sums: array<i32, ${count}>, a: u32, b: u32, lane: u32) -> array<i32, ${count}> {
  var result = sums;
  for (var i = 0u; i < ${count}u * params.one; i++) {
    let e = lane + 32u * i;
    let row = a + (e / ${columns}u) * ${a?.stride}u; let column = b + (e % ${columns}u) * ${b?.stride}u;
    var sum = result[i];
    for (var k = 0u; k < 8u * params.one; k++) { sum += dot4I8Packed(${a?.array}[row + (k >> 2u)][k & 3u], ${b?.array}[column + (k >> 2u)][k & 3u]); }
    result[i] = sum;
  }
  return result;
}`,
      );
      return `${sum} = emulatedProduct_${key}(${sum}, ${left}, ${right}, lane);`;
    },
    store(array, offset, stride, sum) {
      functions.set(
        `store ${array}_${stride}`,
        `fn emulatedStore_${array}_${stride}(offset: u32, sums: array<i32, ${count}>, lane: u32) {
  var values = sums;
  for (var i = 0u; i < ${count}u * params.one; i++) {
    let e = lane + 32u * i; let column = e % ${columns}u;
    ${array}[offset + (e / ${columns}u) * ${stride}u + (column >> 2u)][column & 3u] = bitcast<u32>(values[i]);
  }
}`,
      );
      return `emulatedStore_${array}_${stride}(${offset}, ${sum}, lane);`;
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
${[...functions.values()].join("\n")}`,
  };
}

/**
 * @param kind `device` needs 8-bit matrices of 16 × 16 × 32 (narrow: 16 × 8 × 32) and subgroups of 32; `emulated` runs
 * anywhere, slowly.
 */
export function decodeMatrixDialect(kind: "device" | "emulated", side: FactorSide): DecodeMatrixDialect {
  return kind === "device" ? deviceDialect(side) : emulatedDialect(side);
}
