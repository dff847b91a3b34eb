/** What the device can do at best: f32 multiply-adds from registers, and bytes read from storage. */
import { createKernel, createStorage, type Gpu } from "../src/index.ts";
import { MULTIPLY_ADD_CODE } from "./roof-kernels.wgsl.ts";
import { timePass } from "./timing.ts";

const READ_CODE = `
@group(0) @binding(0) var<storage, read> input: array<vec4u>;
@group(0) @binding(1) var<storage, read_write> output: array<vec4u>;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(num_workgroups) groups: vec3u, @builtin(local_invocation_index) lane: u32) {
  var sum = vec4u();
  for (var i = 0u; i < 64u; i++) { sum += input[(group.x * 64u + i) * 64u + lane]; }
  output[group.x * 64u + lane] = sum;
}`;

/** GFLOP/s of f32 multiply-adds (two operations each) with nothing to load. */
export async function multiplyAddRoof(gpu: Gpu): Promise<number> {
  const groups = gpu.profile === "software" ? 64 : 132 * 64;
  const kernel = await createKernel(gpu, { label: "fma roof", code: MULTIPLY_ADD_CODE, bindings: ["read_write"] });
  const bound = kernel.bind([createStorage(gpu, "out", groups * 64 * 16)]);
  const { best } = await timePass(gpu, (pass) => bound.encode(pass, undefined, [groups]), 10);
  return (groups * 64 * 256 * 8 * 4 * 2) / best / 1e3;
}

/** GB/s of a kernel that only reads, from a working set of 64 MiB (software) or 1 GiB. */
export async function readRoof(gpu: Gpu): Promise<number> {
  const bytes = gpu.profile === "software" ? 64 * 2 ** 20 : 2 ** 30;
  const groups = bytes / (64 * 64 * 16);
  const kernel = await createKernel(gpu, { label: "read roof", code: READ_CODE, bindings: ["read", "read_write"] });
  const bound = kernel.bind([createStorage(gpu, "in", bytes), createStorage(gpu, "out", groups * 64 * 16)]);
  const { best } = await timePass(gpu, (pass) => bound.encode(pass, undefined, [groups]), 10);
  return bytes / best / 1e3;
}
