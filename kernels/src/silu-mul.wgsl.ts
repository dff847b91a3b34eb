/** Kernel of `silu-mul.ts`. */
import type { DeviceProfile } from "./device.ts";
import { ELEMENT_THREADS } from "./element-grid.ts";
import { type ActivationOutput, outputElement, outputFunctions, outputValue } from "./half-output.wgsl.ts";

export interface SiluMulTemplate {
  readonly width: number;
  readonly output: ActivationOutput;
  readonly threads: number;
}

/** Threads of a workgroup. */
export function siluMulThreads(profile: DeviceProfile): number {
  return profile === "hardware" ? 256 : ELEMENT_THREADS;
}

/** One thread a vec4 of outputs; grid: x over width / 4, y rows. */
export function siluMulWgsl({ width, output, threads }: SiluMulTemplate): string {
  const vectors = width / 4;
  return `
@group(0) @binding(0) var<storage, read> gateUp: array<vec4f>;
@group(0) @binding(1) var<storage, read_write> output: array<${outputElement(output)}>;
${outputFunctions(output)}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let column = group.x * ${threads}u + lane;
  if (column >= ${vectors}u) { return; }
  let gate = gateUp[group.y * ${2 * vectors}u + column];
  let up = gateUp[group.y * ${2 * vectors}u + ${vectors}u + column];
  // exp(-gate) stays finite: beyond 88 the sigmoid is 0 in f32 to the last bit that matters.
  let sigmoid = vec4f(1.0) / (vec4f(1.0) + exp(min(-gate, vec4f(88.0))));
  output[group.y * ${vectors}u + column] = ${outputValue(output, "gate * sigmoid * up")};
}
`;
}
