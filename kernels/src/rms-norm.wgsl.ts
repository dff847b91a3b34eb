/** Kernel of `rms-norm.ts`. */

export const RMS_NORM_THREADS = 64;

/** One workgroup a row; grid: x rows. `gathered` reads the row's index from `rowIndices`. */
export function rmsNormWgsl(hidden: number, epsilon: number, gathered: boolean): string {
  const vectors = hidden / 4;
  return `
@group(0) @binding(0) var<storage, read> input: array<vec4f>;
@group(0) @binding(1) var<storage, read> weight: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> output: array<vec4f>;
${gathered ? "@group(0) @binding(3) var<storage, read> rowIndices: array<u32>;" : ""}

var<workgroup> partials: array<f32, ${RMS_NORM_THREADS}>;

@compute @workgroup_size(${RMS_NORM_THREADS})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let source = ${gathered ? "rowIndices[group.x]" : "group.x"} * ${vectors}u;
  var squares = vec4f();
  for (var at = lane; at < ${vectors}u; at += ${RMS_NORM_THREADS}u) {
    let value = input[source + at];
    squares = fma(value, value, squares);
  }
  partials[lane] = (squares.x + squares.y) + (squares.z + squares.w);
  workgroupBarrier();
  var total = 0.0;
  for (var other = 0u; other < ${RMS_NORM_THREADS}u; other++) { total += partials[other]; }
  let scale = 1.0 / sqrt(total / ${hidden.toFixed(1)} + ${epsilon.toExponential()});
  for (var at = lane; at < ${vectors}u; at += ${RMS_NORM_THREADS}u) {
    output[group.x * ${vectors}u + at] = input[source + at] * scale * weight[at];
  }
}
`;
}
