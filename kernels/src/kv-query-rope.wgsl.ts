/** WGSL that reads one channel of a query head and turns it, for kernels that take q before rotary embedding. */
import type { RopeLayout } from "./kv-kernels.ts";

export interface QueryRope {
  /** Dimensions that turn: the first of the head. */
  readonly ropeDim: number;
  readonly ropeLayout: RopeLayout;
}

/**
 * Text of `turnedQuery(base, c, position)`: channel c of the head whose first f32 is `qkv[base]`, turned to `position`.
 * Reads the bindings `qkv` (array<f32>) and `ropeTable` (array<vec2f>, cos and sin).
 */
export function queryRopeWgsl({ ropeDim, ropeLayout }: QueryRope): string {
  const half = ropeDim / 2;
  const places =
    ropeLayout === "half"
      ? `let second = c >= ${half}u; let pair = select(c, c - ${half}u, second); let other = select(c + ${half}u, c - ${half}u, second);`
      : "let second = (c & 1u) == 1u; let pair = c / 2u; let other = c ^ 1u;";
  return `
fn turnedQuery(base: u32, c: u32, position: u32) -> f32 {
  let x = qkv[base + c];
  if (c >= ${ropeDim}u) { return x; }
  ${places}
  let cs = ropeTable[position * ${half}u + pair];
  return fma(x, cs.x, qkv[base + other] * select(-cs.y, cs.y, second));
}`;
}
