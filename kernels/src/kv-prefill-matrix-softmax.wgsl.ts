/** WGSL of the softmax of a step, by the threads that own the queries, and of its slow path. */
import { each, SENTINEL } from "./kv-attention-template.ts";
import { type PrefillMatrixContext as Context, loadVectors, loop } from "./kv-prefill-matrix-context.ts";
import { KEY_TILE } from "./kv-prefill-matrix-plan.ts";

/** A logit may exceed its query's reference by this many powers of two: weights stay far below f16's 65504. */
const HEADROOM = "8.0";

/** Statements that read logits `at` of the thread's query as `name`, and how a logit becomes a weight. */
function readLogits(masked: boolean) {
  return {
    load: (name: string, at: string) =>
      masked
        ? `let seen${name} = vec4<u32>(firstToken + 4u * (${at})) + vec4<u32>(0u, 1u, 2u, 3u) <= vec4<u32>(see); let ${name} = select(vec4f(${SENTINEL}), board[logitRow + ${at}], seen${name});`
        : `let ${name} = board[logitRow + ${at}];`,
    weight: (name: string) => (masked ? `select(vec4f(0.0), exp2(${name} - top), seen${name})` : `exp2(${name} - top)`),
  };
}

/** Statements: `best` becomes the largest of all logits of the thread's query. */
export function largest(context: Context, masked: boolean): string {
  return `var most = vec4f(${SENTINEL});
    ${loop(context, "j", KEY_TILE / 4, (j) => `${readLogits(masked).load("x", j)} most = max(most, x);`)}
    let best = max(max(most.x, most.y), max(most.z, most.w));`;
}

/** Statements: the thread's part of its query's weights goes to `weights`, their sum to `total`; `most` is the largest logit. */
function weigh(context: Context, masked: boolean): string {
  const own = KEY_TILE / 4 / context.s.rowThreads;
  const { load, weight } = readLogits(masked);
  return `var most = vec4f(${SENTINEL}); var sum = 0.0;
    ${loop(
      context,
      "j",
      own / 2,
      (j) => `let first = part * ${own}u + 2u * ${j};
      ${load("x", "first")} ${load("y", "first + 1u")}
      most = max(most, max(x, y));
      let p = ${weight("x")}; let q = ${weight("y")};
      sum += ((p.x + p.y) + (p.z + p.w)) + ((q.x + q.y) + (q.z + q.w));
      weights[weightRow + part * ${own / 2}u + ${j}] = vec4<u32>(pack2x16float(p.xy), pack2x16float(p.zw), pack2x16float(q.xy), pack2x16float(q.zw));`,
    )}
    total = fma(before, factor, sum);`;
}

/** Weights against the query's reference `top`; asks for the slow path where a logit exceeds it by too much. */
export function weights(context: Context, masked: boolean): string {
  return `let factor = 1.0;
    ${weigh(context, masked)}
    if (max(max(most.x, most.y), max(most.z, most.w)) > top + ${HEADROOM}) { kv[${context.s.d / 8}u].x = 1u; }`;
}

/**
 * The slow path of tile t - 1: queries whose logits exceed their reference take a new one; every query's output is scaled, by
 * 1 for the others, 32 channels at a time through `board`.
 */
export function rescue(context: Context): string {
  const { s, dialect, template } = context;
  const { rowBlocks, columnGroups } = template.plan;
  const perRound = 2 / columnGroups;
  const rounds = Math.ceil(s.channelBlocks / perRound);
  const own = KEY_TILE / 4 / s.rowThreads;
  const blocks = (round: number, text: (r: number, c: number, at: string) => string) =>
    each(
      rowBlocks,
      (r) =>
        each(
          Math.min(perRound, s.channelBlocks - round * perRound),
          (b) =>
            text(
              r,
              round * perRound + b,
              `(rowBase + ${16 * r}u) * ${s.logitVectors}u + (columnGroup * ${perRound}u + ${b}u) * 4u`,
            ),
          " ",
        ),
      " ",
    );
  return `if (thread == 0u) { kv[${s.d / 8}u].x = 0u; }
    var factor = 1.0;
    {
    ${largest(context, true)}
    if (best > top + ${HEADROOM}) {
      factor = exp2(top - best);
      top = best;
      ${weigh(context, true)}
    }
    }
    ${each(
      rounds,
      (round) => `workgroupBarrier();
    ${blocks(round, (r, c, at) => dialect.storeVectors("board", "vec4f", at, `${s.logitVectors}u`, `o${r}_${c}`))}
    workgroupBarrier();
    ${each(own, (j) => `board[logitRow + part * ${own}u + ${j}u] *= factor;`, " ")}
    workgroupBarrier();
    ${blocks(round, (r, c, at) => loadVectors(context, at, `${s.logitVectors}u`, `o${r}_${c}`))}`,
      "\n    ",
    )}
    workgroupBarrier();`;
}
