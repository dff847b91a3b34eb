/** Immediates that every linear kernel takes. */

/** Bytes of `Parameters`. */
export const LINEAR_IMMEDIATE_BYTES = 32;

export const LINEAR_PARAMETERS = `
struct Parameters { rows: u32, n: u32, k: u32, outputStride: u32, outputOffset: u32, pad0: u32, pad1: u32, pad2: u32 }
var<immediate> parameters: Parameters;
`;
