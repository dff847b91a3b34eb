/** How activations travel between layers on this device. */
import type { Gpu } from "./device.ts";

/**
 * `f16`: the inputs of linear layers are `array<vec4<u32>>`, [rows][K] halves, clamped to ±65504; K a multiple of 32.
 * `f32`: they are `array<vec4f>`, [rows][K]. The residual stream, q, k and v, and logits are f32 either way.
 */
export type ActivationType = "f32" | "f16";

/** f16 where the device multiplies f16 matrices. @param forced for tests: runs the f16 path on drivers without them. */
export function activationType(gpu: Gpu, forced?: ActivationType): ActivationType {
  return forced ?? (gpu.profile === "hardware" && gpu.features.subgroupMatrix ? "f16" : "f32");
}
