/** Text shared by kernels whose output may be f32 or f16. */

/** Type of a kernel's output: f32 as vec4f, or f16 as pairs in u32, clamped to ±65504. */
export type ActivationOutput = "f32" | "f16";

/**
 * Four f32 as two words of f16 pairs, clamped to ±65504 so that no infinity is made. A NaN stays one: `clamp` may drop
 * it, and what was not finite must reach the logits, where it is reported.
 */
export const PACK_HALVES_WGSL = `
fn packHalves(x: vec4f) -> vec2u {
  let isNan = (bitcast<vec4u>(x) & vec4u(0x7fffffffu)) > vec4u(0x7f800000u);
  let y = select(clamp(x, vec4f(-65504.0), vec4f(65504.0)), x, isNan);
  return vec2u(pack2x16float(y.xy), pack2x16float(y.zw));
}`;

/** Element type of the output array. */
export function outputElement(output: ActivationOutput): string {
  return output === "f16" ? "vec2u" : "vec4f";
}

/** Functions that {@link outputValue} needs. */
export function outputFunctions(output: ActivationOutput): string {
  return output === "f16" ? PACK_HALVES_WGSL : "";
}

/** Text of a vec4f expression as an element of the output array. */
export function outputValue(output: ActivationOutput, value: string): string {
  return output === "f16" ? `packHalves(${value})` : value;
}
