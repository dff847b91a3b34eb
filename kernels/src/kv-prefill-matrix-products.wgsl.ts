/** WGSL of the two products of a step. */
import { each } from "./kv-attention-template.ts";
import { type PrefillMatrixContext as Context, loop } from "./kv-prefill-matrix-context.ts";
import { KEY_TILE } from "./kv-prefill-matrix-plan.ts";

/** logits = queries * keys, into `board`. */
export function logits(context: Context): string {
  const { s, dialect, template, registers } = context;
  const { rowBlocks } = template.plan;
  const product = (k: string) => {
    const index = Number.parseInt(k, 10);
    const lefts = each(
      rowBlocks,
      (r) =>
        registers
          ? ""
          : dialect.loadLeft(`a${r}`, {
              array: "queries",
              offset: `(rowBase + ${16 * r}u) * ${s.rowVectors}u + ${k} * 2u`,
              stride: `${s.rowVectors}u`,
              major: "row",
            }),
      " ",
    );
    return `${lefts}
    ${each(
      s.keyBlocks,
      (n) =>
        `${dialect.loadRight(`b${n}`, {
          array: "kv",
          offset: `(columnGroup * ${s.keyBlocks}u + ${n}u) * ${16 * s.rowVectors}u + ${k} * 2u`,
          stride: `${s.rowVectors}u`,
          major: "column",
        })} ${each(rowBlocks, (r) => dialect.multiplyAccumulate(`s${r}_${n}`, registers ? `q${r}_${index}` : `a${r}`, `b${n}`), " ")}`,
      "\n    ",
    )}`;
  };
  const pairs = (text: (r: number, n: number) => string) =>
    each(rowBlocks, (r) => each(s.keyBlocks, (n) => text(r, n), " "), " ");
  return `{
    ${pairs((r, n) => `var s${r}_${n} = ${dialect.zero};`)}
    ${loop(context, "k", s.d / 16, product)}
    ${pairs((r, n) => dialect.storeVectors("board", "vec4f", `(rowBase + ${16 * r}u) * ${s.logitVectors}u + (columnGroup * ${s.keyBlocks}u + ${n}u) * 4u`, `${s.logitVectors}u`, `s${r}_${n}`))}
  }`;
}

/** output += weights * values. */
export function products(context: Context): string {
  const { s, dialect, template } = context;
  const { rowBlocks } = template.plan;
  return loop(
    context,
    "k",
    KEY_TILE / 16,
    (k) => `${each(
      rowBlocks,
      (r) =>
        dialect.loadLeft(`a${r}`, {
          array: "weights",
          offset: `(rowBase + ${16 * r}u) * ${s.weightVectors}u + ${k} * 2u`,
          stride: `${s.weightVectors}u`,
          major: "row",
        }),
      " ",
    )}
    ${each(
      s.channelBlocks,
      (c) =>
        `${dialect.loadRight(`b${c}`, {
          array: "kv",
          offset: `${KEY_TILE * s.rowVectors}u + ${k} * ${16 * s.rowVectors}u + (columnGroup * ${s.channelBlocks}u + ${c}u) * 2u`,
          stride: `${s.rowVectors}u`,
          major: "row",
        })} ${each(rowBlocks, (r) => dialect.multiplyAccumulate(`o${r}_${c}`, `a${r}`, `b${c}`), " ")}`,
      "\n    ",
    )}`,
  );
}
