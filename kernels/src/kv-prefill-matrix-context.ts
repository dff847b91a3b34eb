/** What the parts of the matrix kernel's text share. */
import { each } from "./kv-attention-template.ts";
import type { PrefillMatrixSizes, PrefillMatrixTemplate } from "./kv-prefill-matrix-plan.ts";
import type { MatrixDialect } from "./subgroup-matrix.ts";

/** One kernel text in the making. */
export interface PrefillMatrixContext {
  readonly template: PrefillMatrixTemplate;
  readonly s: PrefillMatrixSizes;
  readonly dialect: MatrixDialect;
  readonly registers: boolean;
  /** What the text is for: sealed tokens, the window's, or (where the text is written once) either. */
  readonly phase: "sealed" | "window" | "either";
}

/** Statements of one phase or the other, by the value `isSealed` where the text serves both. */
export function inPhase({ phase }: PrefillMatrixContext, sealed: string, window: string): string {
  if (phase !== "either") return `{ ${phase === "sealed" ? sealed : window} }`;
  return `if (isSealed) { ${sealed} } else { ${window} }`;
}

/** Statement: `sum` is read back from where `storeVectors` put it. */
export function loadVectors(
  { dialect, template }: PrefillMatrixContext,
  offset: string,
  stride: string,
  sum: string,
): string {
  return template.dialect === "device"
    ? dialect.load("board", offset, stride, sum)
    : `${sum} = emulatedLoadVectors(${offset}, ${stride}, lane);`;
}

/** Function that {@link loadVectors} calls in the emulated dialect. */
export const EMULATED_LOAD_VECTORS = `
fn emulatedLoadVectors(firstVector: u32, stride: u32, lane: u32) -> array<f32, 8> {
  var values = array<f32, 8>();
  let never = lane >> 8u;
  for (var i = 0u; i < 8u + never; i++) {
    let e = lane + 32u * i;
    values[i] = board[firstVector + (e >> 4u) * stride + ((e & 15u) >> 2u)][e & 3u];
  }
  return values;
}`;

/** A loop over matrices: written out for devices, a loop where the compiler would drown in the text. */
export function loop(
  { template }: PrefillMatrixContext,
  name: string,
  count: number,
  body: (i: string) => string,
): string {
  if (template.dialect === "device") return each(count, (i) => `{ ${body(`${i}u`)} }`, "\n    ");
  return `for (var ${name} = 0u; ${name} < ${count}u * params.one; ${name}++) { ${body(name)} }`;
}
