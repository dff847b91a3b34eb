/** What every linear kernel shares: the immediates, and the store. */

/** Bytes of `Parameters`. */
export const LINEAR_IMMEDIATE_BYTES = 32;

/** `steps`: code words of a group. `accumulate`: 1 adds to the output instead of replacing it. */
export const LINEAR_PARAMETERS = `
struct Parameters {
  rows: u32, n: u32, k: u32, outputStride: u32, outputOffset: u32, steps: u32, accumulate: u32, reserved: u32,
}
var<immediate> parameters: Parameters;
`;

/** Needs `output: array<f32>`. */
export const LINEAR_STORE = `
fn store(at: u32, value: f32) {
  if (parameters.accumulate != 0u) { output[at] = output[at] + value; } else { output[at] = value; }
}
`;
