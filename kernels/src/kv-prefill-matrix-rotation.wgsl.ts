/** WGSL of the orthonormal Hadamard transform of f32 rows in workgroup memory. */
import { each } from "./kv-attention-template.ts";
import type { PrefillMatrixSizes } from "./kv-prefill-matrix-plan.ts";

const butterfly = (a: string, b: string) => `{ let u = ${a}; let v = ${b}; ${a} = u + v; ${b} = u - v; }`;

/** Stages over `count` values named by `name`. */
function stages(count: number, name: (i: number) => string): string {
  const lines: string[] = [];
  for (let stride = 1; stride < count; stride *= 2) {
    for (let i = 0; i < count; i++) {
      if ((i & stride) === 0) lines.push(butterfly(name(i), name(i + stride)));
    }
  }
  return lines.join("\n    ");
}

/**
 * `rotateRows(thread)`: all rows of one group of queries in `board`, in two passes with barriers before, between and after:
 * 16 neighbouring values of a thread, then values 16 apart. Any order of channels that permutes the bits of their index
 * has the same transform.
 */
export function rotateRows(s: PrefillMatrixSizes): string {
  const { d, groupRows, boardVectors, threads } = s;
  const far = d / 16;
  return `
fn rotateRows(thread: u32) {
  workgroupBarrier();
  for (var i = thread; i < ${groupRows * far}u * params.one; i += ${threads}u) {
    let at = (i / ${far}u) * ${boardVectors}u + (i % ${far}u) * 4u;
    ${each(4, (k) => `var x${k} = board[at + ${k}u];`, " ")}
    ${stages(16, (i) => `x${i >> 2}.${"xyzw"[i & 3]}`)}
    ${each(4, (k) => `board[at + ${k}u] = x${k};`, " ")}
  }
  workgroupBarrier();
  for (var i = thread; i < ${groupRows * 4}u * params.one; i += ${threads}u) {
    let at = (i / 4u) * ${boardVectors}u + i % 4u;
    ${each(far, (k) => `var x${k} = board[at + ${4 * k}u];`, " ")}
    ${stages(far, (i) => `x${i}`)}
    ${each(far, (k) => `board[at + ${4 * k}u] = x${k} * ${1 / Math.sqrt(d)};`, " ")}
  }
  workgroupBarrier();
}`;
}
