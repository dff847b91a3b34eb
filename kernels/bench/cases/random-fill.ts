/** Random data made on the GPU: a gigabyte takes a millisecond there, and minutes on the host. */
import { createKernel, type Gpu, submitPass } from "../../src/index.ts";

/**
 * `halves`: pairs of f16. `floats`: f32. Both normal with deviation 1 times `scale`. `ranked`: f32 logits that fall with the
 * logarithm of a random rank, as a language model's do: some dozens of tokens hold most of the mass.
 */
export type RandomKind = "halves" | "floats" | "ranked";

function fillWgsl(kind: RandomKind, scale: number): string {
  const factor = scale.toExponential();
  const value = kind === "halves" ? `pack2x16float(${factor} * normals(i))` : `bitcast<u32>(${factor} * normals(i).x)`;
  return `
@group(0) @binding(0) var<storage, read_write> output: array<u32>;
fn hash(x: u32) -> u32 {
  var v = x * 747796405u + 2891336453u;
  v = ((v >> ((v >> 28u) + 4u)) ^ v) * 277803737u;
  return (v >> 22u) ^ v;
}
// Box and Muller.
fn normals(i: u32) -> vec2f {
  let first = hash(i);
  let radius = sqrt(-2.0 * log((f32(first >> 8u) + 1.0) / 16777217.0));
  let angle = f32(hash(first ^ 0x9e3779b9u) >> 8u) * (6.2831853 / 16777216.0);
  return radius * vec2f(cos(angle), sin(angle));
}
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  for (var i = id.x; i < arrayLength(&output); i += groups.x * 256u) { output[i] = ${value}; }
}`;
}

/** Fills the whole buffer. */
export async function fillRandom(gpu: Gpu, buffer: GPUBuffer, kind: RandomKind, scale = 1): Promise<void> {
  const kernel = await createKernel(gpu, {
    label: `random ${kind}`,
    code: fillWgsl(kind, scale),
    bindings: ["read_write"],
  });
  submitPass(gpu, (pass) => kernel.bind([buffer]).encode(pass, undefined, [gpu.profile === "hardware" ? 4096 : 16]));
}

/** Fills the buffer with NaN, as f32 and as f16. */
export function poisonBuffer(gpu: Gpu, buffer: GPUBuffer): void {
  const chunk = new Uint32Array(Math.min(buffer.size, 16 << 20) / 4).fill(0x7fff_7fff);
  for (let at = 0; at < buffer.size; at += chunk.byteLength) {
    gpu.device.queue.writeBuffer(buffer, at, chunk, 0, Math.min(chunk.length, (buffer.size - at) / 4));
  }
}

/** ‖got − want‖₂ / ‖want‖₂ over pairs; NaN where a value is. */
export function relativeError(got: ArrayLike<number>, want: ArrayLike<number>): number {
  let error = 0;
  let norm = 0;
  for (let i = 0; i < want.length; i++) {
    error += ((got[i] as number) - (want[i] as number)) ** 2;
    norm += (want[i] as number) ** 2;
  }
  return error === 0 ? 0 : Math.sqrt(error / norm);
}
