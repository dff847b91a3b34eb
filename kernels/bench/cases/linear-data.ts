/** Random weights and inputs of linear layers, with the outputs that they must give. */
import { dequantizeGgml, type GgmlType, ggmlByteLength, halfToFloat, type LinearEpilogue } from "../../src/index.ts";
import { randomGgml } from "../../src/testing/ggml-blocks.ts";
import { Random } from "../../src/testing/random.ts";

export interface LinearShape {
  readonly type: GgmlType;
  readonly rows: number;
  readonly columns: number;
  readonly outputs: number;
  readonly epilogue?: LinearEpilogue;
}

export interface LinearData {
  /** ggml blocks, [outputs][columns]. */
  readonly weights: Uint8Array<ArrayBuffer>;
  /** f16 [rows][columns]. */
  readonly input: Uint8Array<ArrayBuffer>;
  /** Sum over the columns in f64. */
  product(row: number, output: number): number;
}

/** Rows of weights that are drawn; the matrix repeats them. */
const DRAWN_ROWS = 61;
/** Rows of inputs that are drawn. */
const DRAWN_INPUTS = 37;

function repeated(block: Uint8Array, bytes: number): Uint8Array<ArrayBuffer> {
  const result = new Uint8Array(bytes);
  for (let at = 0; at < bytes; at += block.length)
    result.set(block.subarray(0, Math.min(block.length, bytes - at)), at);
  return result;
}

/** A layer with random weights and inputs, and what is needed to compute any output in f64. */
export function linearData(shape: LinearShape): LinearData {
  const { type, rows, columns, outputs } = shape;
  const random = new Random(rows + columns + outputs);
  const drawn = randomGgml(random, type, DRAWN_ROWS * columns);
  const halves = new Uint16Array(DRAWN_INPUTS * columns);
  // 2^-3 … 2 of either sign.
  for (let index = 0; index < halves.length; index++) halves[index] = (random.uint32() & 0x93ff) | 0x3000;
  const weights = dequantizeGgml(type, drawn, DRAWN_ROWS * columns);
  return {
    weights: repeated(drawn, ggmlByteLength(type, outputs * columns)),
    input: repeated(new Uint8Array(halves.buffer), rows * columns * 2),
    product(row: number, output: number): number {
      let sum = 0;
      for (let k = 0; k < columns; k++) {
        const x = halfToFloat(halves[(row % DRAWN_INPUTS) * columns + k] as number);
        sum += x * (weights[(output % DRAWN_ROWS) * columns + k] as number);
      }
      return sum;
    },
  };
}

/** Value in f64 of one output, and where it lies. */
export function linearReference(
  shape: LinearShape,
  data: LinearData,
  row: number,
  output: number,
): { readonly want: number; readonly byte: number } {
  const { outputs, epilogue } = shape;
  if (epilogue !== "silu-mul") return { want: data.product(row, output), byte: (row * outputs + output) * 4 };
  const features = outputs / 2;
  const gate = data.product(row, output);
  const up = data.product(row, features + output);
  return { want: (gate / (1 + Math.exp(-gate))) * up, byte: (row * features + output) * 2 };
}
