/** WGSL of attention over 32 f16 tokens: rows of the chunk, of the residual, or of f16 pages. See kv-attention.wgsl.ts. */
import { each, SENTINEL, type Shapes } from "./kv-attention-template.ts";

/** Adds p * V of 32 f16 tokens; `word(token, channel)` is the text of the u32 that holds the channel. */
export function halfOutput(s: Shapes, word: (token: string, channel: string) => string): string {
  const { lanes, tokenVectors, channelVectors, queries } = s;
  return `${each(tokenVectors, (v) => `    ${each(queries, (m) => `weights[${m * 32 + v * lanes}u + lane] = p${v}_${m};`, " ")}`)}
    workgroupBarrier();
    for (var t = 0u; t < 32u * params.one; t++) {
        ${each(channelVectors, (c) => `let v${c} = unpack2x16float(${word("t", `(${c * lanes}u + lane)`)} >> ((lane & 1u) * 16u)).x;`, "\n        ")}
${each(queries, (m) => `        { let pb = weights[${m * 32}u + t]; ${each(channelVectors, (c) => `o${m}_${c} = fma(pb, v${c}, o${m}_${c});`, " ")} }`)}
    }
    workgroupBarrier();`;
}

/** Logits of up to 32 f16 tokens from `first` on; row m sees tokens up to its own. */
export function halfLogits(s: Shapes): string {
  const { d, lanes, tokenVectors, queries, template } = s;
  const heads = template.queryHeads;
  const words = lanes / 2;
  const multiply = (factor: (m: number, at: 0 | 1) => string, word: (v: number) => string) =>
    `{ ${each(tokenVectors, (v) => `let x${v} = unpack2x16float(${word(v)});`, " ")}
${each(queries, (m) => `        { let b0 = ${factor(m, 0)}; let b1 = ${factor(m, 1)}; ${each(tokenVectors, (v) => `s${v}_${m} = fma(b1, x${v}.y, fma(b0, x${v}.x, s${v}_${m}));`, " ")} }`)} }`;
  const loop = template.lanePlan.subgroups
    ? `    for (var chunk = 0u; chunk < ${d / lanes}u * params.one; chunk++) {
${each(tokenVectors, (v) => each(words, (w) => `      let k${v}_${w} = kvRows[a${v} + chunk * ${words}u + ${w}u];`))}
${each(queries, (m) => `      let f${m} = qHalf[${m * d}u + chunk * ${lanes}u + lane];`)}
${each(words, (w) =>
  multiply(
    (m, at) => `subgroupBroadcast(f${m}, ${2 * w + at}u)`,
    (v) => `k${v}_${w}`,
  ),
)}
    }`
    : `    for (var w = 0u; w < ${d / 2}u * params.one; w++) ${multiply(
        (m, at) => `qHalf[${m * d + at}u + 2u * w]`,
        (v) => `kvRows[a${v} + w]`,
      )}`;
  return `${each(tokenVectors, (v) => `    let t${v} = first + ${v * lanes}u + lane; let a${v} = halfRow(min(t${v}, last)); ${each(queries, (m) => `var s${v}_${m} = 0.0;`, " ")}`)}
${loop}
${each(tokenVectors, (v) => each(queries, (m) => `    let seen${v}_${m} = t${v} <= see${Math.floor(m / heads)}; s${v}_${m} = select(${SENTINEL}, s${v}_${m}, seen${v}_${m});`))}`;
}
