/** f64 reference of the linear layer, on the decoded weights, so that no quantization error is mixed in. */
import { dequantizeGgml } from "./ggml-quants.ts";
import type { LinearWeightPart } from "./linear-weight.ts";

/** @param input f32 [rows][columns]. @returns [rows][N], N = the sum of the parts' rows. */
export function linearReference(
  input: Float32Array,
  rows: number,
  columns: number,
  parts: readonly LinearWeightPart[],
): Float64Array {
  const outputs = parts.reduce((sum, part) => sum + part.rows, 0);
  const result = new Float64Array(rows * outputs);
  let first = 0;
  for (const part of parts) {
    const weight = dequantizeGgml(part.type, part.data, part.rows * columns);
    for (let row = 0; row < rows; row++) {
      for (let n = 0; n < part.rows; n++) {
        let sum = 0;
        for (let k = 0; k < columns; k++)
          sum += (input[row * columns + k] as number) * (weight[n * columns + k] as number);
        result[row * outputs + first + n] = sum;
      }
    }
    first += part.rows;
  }
  return result;
}
