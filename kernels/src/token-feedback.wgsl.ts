/** Kernels of `token-feedback.ts`. */

/** Threads of both kernels: one a row. */
export const FEEDBACK_THREADS = 64;
/** Bytes of the immediates of the load: rows. */
export const LOAD_IMMEDIATE_BYTES = 4;
/** Bytes of the immediates of the store: first row, rows, first row of the log. */
export const STORE_IMMEDIATE_BYTES = 12;

export function tokenLoadWgsl(fromSlot: number): string {
  return `requires immediate_address_space;
struct Parameters { rows: u32 }
var<immediate> parameters: Parameters;
@group(0) @binding(0) var<storage, read> rows: array<vec2u>;
@group(0) @binding(1) var<storage, read> slotTokens: array<u32>;
@group(0) @binding(2) var<storage, read_write> tokens: array<u32>;

@compute @workgroup_size(${FEEDBACK_THREADS})
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= parameters.rows) { return; }
  let row = rows[id.x];
  if (row.y == ${fromSlot}u) {
    tokens[id.x] = slotTokens[row.x];
  } else {
    tokens[id.x] = row.y;
  }
}
`;
}

export function tokenStoreWgsl(): string {
  return `requires immediate_address_space;
struct Parameters { first: u32, rows: u32, log: u32 }
struct Request { sampling: vec4u, seedHigh: u32, position: u32, reserved0: u32, reserved1: u32 }
var<immediate> parameters: Parameters;
@group(0) @binding(0) var<storage, read> results: array<vec4u>;
@group(0) @binding(1) var<storage, read> rows: array<vec2u>;
@group(0) @binding(2) var<storage, read_write> slotTokens: array<u32>;
@group(0) @binding(3) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(4) var<storage, read_write> requests: array<Request>;
@group(0) @binding(5) var<storage, read_write> log: array<vec4u>;

@compute @workgroup_size(${FEEDBACK_THREADS})
fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x >= parameters.rows) { return; }
  let row = parameters.first + id.x;
  let result = results[id.x];
  slotTokens[rows[row].x] = result.x;
  tokens[row] = result.x;
  requests[id.x].position++;
  log[parameters.log + row] = result;
}
`;
}
