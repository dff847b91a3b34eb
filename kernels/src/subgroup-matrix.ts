/**
 * Products of 16 × 16 × 16 f16 matrices with f32 sums, as text for kernel templates: the device's subgroup matrices
 * (Dawn's `chromium_experimental_subgroup_matrix`), or the same operations written out, so that every matrix kernel is
 * fuzzed on drivers without them.
 *
 * A matrix belongs to 32 neighbouring threads ("subgroup" below): all of them must reach each statement. f16 operands lie
 * in arrays of `vec4<u32>` (8 halves each; offsets and strides count vec4s), accumulators in arrays of f32.
 */

/** Side of every matrix: rows, columns and depth of one product. */
export const MATRIX_SIZE = 16;

/** Threads that own a matrix together. */
export const MATRIX_THREADS = 32;

/** Where an f16 operand lies: 16 lines of 16 halves. */
export interface MatrixSource {
  /** Name of a module-scope `array<vec4<u32>>` in workgroup or storage memory. */
  readonly array: string;
  /** Text: index of the first vec4. */
  readonly offset: string;
  /** Text: vec4s from one line to the next. */
  readonly stride: string;
  /** What a line is: a row of the matrix, or a column. */
  readonly major: "row" | "column";
}

/** Writes one kernel's matrix statements; make a new one for each kernel text. */
export interface MatrixDialect {
  /** `enable` and `diagnostic` lines: the first lines of the module. */
  readonly directives: string;
  /** Type of an accumulator: 16 × 16 f32. */
  readonly accumulator: string;
  /** Expression: an accumulator of zeros. */
  readonly zero: string;
  /** Statement: `name` becomes the left operand (rows m, columns k). The memory must stay as it is until its last use. */
  loadLeft(name: string, source: MatrixSource): string;
  /** Statement: `name` becomes the right operand (rows k, columns n). A transposed [n][k] array is `major: "column"`. */
  loadRight(name: string, source: MatrixSource): string;
  /** Statement: `sum += left * right`; `sum` is a `var` of type `accumulator`. */
  multiplyAccumulate(sum: string, left: string, right: string): string;
  /** Statement: the accumulator goes to `array` (f32) row by row; `stride` elements from row to row. */
  store(array: string, offset: string, stride: string, sum: string): string;
  /** Statement: as `store`, to an array of vec4s; `offset` and `stride` count those. */
  storeVectors(array: string, type: "vec4f" | "vec4<u32>", offset: string, stride: string, sum: string): string;
  /** Statement: `sum` is read back from where `store` put it. */
  load(array: string, offset: string, stride: string, sum: string): string;
  /** Module-scope functions that the statements above use: call it last, and append it to the module. */
  functions(): string;
}

function deviceDialect(): MatrixDialect {
  const result = "subgroup_matrix_result<f32, 16, 16>";
  const load = (side: "left" | "right", name: string, { array, offset, stride, major }: MatrixSource) =>
    `let ${name} = subgroupMatrixLoad<subgroup_matrix_${side}<f16, 16, 16>, ${major === "row" ? "row_major" : "col_major"}>(&${array}, ${offset}, ${stride});`;
  return {
    directives: `enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);`,
    accumulator: result,
    zero: `${result}()`,
    loadLeft: (name, source) => load("left", name, source),
    loadRight: (name, source) => load("right", name, source),
    multiplyAccumulate: (sum, left, right) => `${sum} = subgroupMatrixMultiplyAccumulate(${left}, ${right}, ${sum});`,
    store: (array, offset, stride, sum) => `subgroupMatrixStore<row_major>(&${array}, ${offset}, ${sum}, ${stride});`,
    storeVectors: (array, _type, offset, stride, sum) =>
      `subgroupMatrixStore<row_major>(&${array}, ${offset}, ${sum}, ${stride});`,
    load: (array, offset, stride, sum) =>
      `${sum} = subgroupMatrixLoad<${result}, row_major>(&${array}, ${offset}, ${stride});`,
    functions: () => "",
  };
}

/** 0, but software drivers do not see it: they would unroll the loops and compile for half a minute. */
const NOT_UNROLLED = "let never = lane >> 8u;";

/** An operand is where it lies (first half, halves a line); a thread holds 8 sums: elements lane, lane + 32, ... */
function emulatedDialect(lane: string): MatrixDialect {
  const sources = new Map<string, MatrixSource>();
  const functions = new Map<string, string>();
  const half = (array: string) => {
    functions.set(
      `half ${array}`,
      `fn emulatedHalf_${array}(at: u32) -> f32 { return unpack2x16float(${array}[at >> 3u][(at >> 1u) & 3u])[at & 1u]; }`,
    );
    return `emulatedHalf_${array}`;
  };
  const operand = (name: string, source: MatrixSource) => {
    sources.set(name, source);
    return `let ${name} = vec2u((${source.offset}) * 8u, (${source.stride}) * 8u);`;
  };
  const element = (name: string, operandName: string, row: string, column: string) => {
    const { array, major } = sources.get(operandName) as MatrixSource;
    const [line, inLine] = major === "row" ? [row, column] : [column, row];
    return `${half(array)}(${name}.x + ${line} * ${name}.y + ${inLine})`;
  };
  const accumulatorAt = "let e = lane + 32u * i; let at = offset + (e >> 4u) * stride + (e & 15u);";
  return {
    directives: "",
    accumulator: "array<f32, 8>",
    zero: "array<f32, 8>()",
    loadLeft: operand,
    loadRight: operand,
    multiplyAccumulate(sum, left, right) {
      const key = [left, right].map((name) => `${sources.get(name)?.array}_${sources.get(name)?.major}`).join("_");
      functions.set(
        `product ${key}`,
        `fn emulatedProduct_${key}(sums: array<f32, 8>, a: vec2u, b: vec2u, lane: u32) -> array<f32, 8> {
  var result = sums;
  ${NOT_UNROLLED}
  for (var i = 0u; i < 8u + never; i++) {
    let row = (lane + 32u * i) >> 4u; let column = (lane + 32u * i) & 15u;
    var sum = result[i];
    for (var k = 0u; k < 16u + never; k++) { sum = fma(${element("a", left, "row", "k")}, ${element("b", right, "k", "column")}, sum); }
    result[i] = sum;
  }
  return result;
}`,
      );
      return `${sum} = emulatedProduct_${key}(${sum}, ${left}, ${right}, ${lane});`;
    },
    store(array, offset, stride, sum) {
      functions.set(
        `store ${array}`,
        `fn emulatedStore_${array}(offset: u32, stride: u32, sums: array<f32, 8>, lane: u32) {
  var values = sums;
  ${NOT_UNROLLED}
  for (var i = 0u; i < 8u + never; i++) { ${accumulatorAt} ${array}[at] = values[i]; }
}`,
      );
      return `emulatedStore_${array}(${offset}, ${stride}, ${sum}, ${lane});`;
    },
    storeVectors(array, type, offset, stride, sum) {
      functions.set(
        `storeVectors ${array}`,
        `fn emulatedStoreVectors_${array}(firstVector: u32, strideVectors: u32, sums: array<f32, 8>, lane: u32) {
  let offset = firstVector * 4u; let stride = strideVectors * 4u;
  var values = sums;
  ${NOT_UNROLLED}
  for (var i = 0u; i < 8u + never; i++) { ${accumulatorAt} ${array}[at >> 2u][at & 3u] = ${type === "vec4f" ? "values[i]" : "bitcast<u32>(values[i])"}; }
}`,
      );
      return `emulatedStoreVectors_${array}(${offset}, ${stride}, ${sum}, ${lane});`;
    },
    load(array, offset, stride, sum) {
      functions.set(
        `load ${array}`,
        `fn emulatedLoad_${array}(offset: u32, stride: u32, lane: u32) -> array<f32, 8> {
  var values = array<f32, 8>();
  ${NOT_UNROLLED}
  for (var i = 0u; i < 8u + never; i++) { ${accumulatorAt} values[i] = ${array}[at]; }
  return values;
}`,
      );
      return `${sum} = emulatedLoad_${array}(${offset}, ${stride}, ${lane});`;
    },
    functions: () => [...functions.values()].join("\n"),
  };
}

/**
 * @param kind `device` needs `features.subgroupMatrix`; `emulated` runs anywhere, slowly.
 * @param lane text of the thread's index in its 32 (only the emulation reads it).
 */
export function matrixDialect(kind: "device" | "emulated", lane = "lane"): MatrixDialect {
  return kind === "device" ? deviceDialect() : emulatedDialect(lane);
}
