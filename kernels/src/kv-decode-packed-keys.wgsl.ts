/** WGSL of the packed decode kernel: logits of 32 tokens from K codes. See kv-decode-packed.wgsl.ts. */
import { each, range } from "./kv-attention-template.ts";
import { DECODE_LANES } from "./kv-decode-lanes.ts";
import { largest, metaText, type PackedPlan, powersText } from "./kv-decode-packed-plan.ts";

/** Words whose products are added in f16 before f32 takes them; sums of codes that carry an offset are large. */
const flushWords = ({ template }: PackedPlan) => (template.form === "offset" ? 1 : 2);

const COMPONENTS = "xyzw";

/** s{r}: the dot product of the lane's token with folded q, in units of the codes. */
function keyProducts(plan: PackedPlan): string {
  const { d, queries, key, keyLoads, rolled } = plan;
  const flush = flushWords(plan);
  const chunks = d / 8;
  const perWord = key.pairs / 4;
  const products = (r: number, at: (chunk: number) => string) =>
    `${each(perWord, (c) => `let f${c} = folded[${at(c)}];`, " ")} %CLEAR%
        ${each(key.pairs, (i) => `acc${r} = fma(bitcast<vec2<f16>>(f${i >> 2}.${COMPONENTS[i & 3]}), e${i}, acc${r});`, " ")}
        %TAKE%`;
  const body = (word: string, first: boolean, last: boolean, at: (r: number, chunk: number) => string) =>
    `    { ${key.prepare("w", word)} ${each(key.pairs, (i) => `let e${i} = ${key.pair("w", i)};`, " ")}
${each(
  queries,
  (r) =>
    `      { ${products(r, (c) => at(r, c))
      .replace("%CLEAR%", first ? `acc${r} = vec2<f16>();` : "")
      .replace("%TAKE%", last ? `let t = vec2f(acc${r}); s${r} += t.x + t.y;` : "")} }`,
)} }`;
  if (!rolled) {
    return range(keyLoads * 4)
      .map((w) =>
        body(
          `cKey${w >> 2}.${COMPONENTS[w & 3]}`,
          w % flush === 0,
          w % flush === flush - 1,
          (r, c) => `${r * chunks + w * perWord + c}u`,
        ),
      )
      .join("\n");
  }
  const steps = range(flush).map((n) =>
    body(
      `keyWords[at / 4u][at % 4u + ${n}u]`,
      n === 0,
      n === flush - 1,
      (r, c) => `${r * chunks + n * perWord + c}u + at * ${perWord}u`,
    ),
  );
  return `    var keyWords = array<vec4u, ${keyLoads}>(${each(keyLoads, (i) => `cKey${i}`, ", ")});
    for (var at = 0u; at < ${keyLoads * 4}u * params.one; at += ${flush}u) {
${steps.join("\n")}
    }`;
}

/** Folds the group's scales and zeros into q: `folded`, zero{r}, and k{r}Back, which undoes the scaling of `folded`. */
function foldQueries({ d, queries, key, metaLanes }: PackedPlan): string {
  const chunks = d / 8;
  const mine = (text: string) => (metaLanes < DECODE_LANES ? `select(0.0, ${text}, lane < ${metaLanes}u)` : text);
  return `    ${metaText("k", "cKeyMeta", key.base)}
${each(
  queries,
  (r) => `    let x${r} = q${r} * kScale; let y${r} = abs(x${r});
    ${powersText(`k${r}`, largest(`y${r}`), key)}
    { let a = x${r}.xy * (k${r}Raise * place0); let b = x${r}.zw * (k${r}Raise * place1);
      folded[${r * chunks}u + metaLane / 2u][(metaLane & 1u) * 2u] = bitcast<u32>(vec2<f16>(a)); folded[${r * chunks}u + metaLane / 2u][(metaLane & 1u) * 2u + 1u] = bitcast<u32>(vec2<f16>(b)); }
    let zero${r} = laneSum(${mine(`dot(q${r}, kZero)`)}, lane); var s${r} = 0.0; var acc${r} = vec2<f16>();`,
)}`;
}

/** Logits, relative weights p{r} (also in `probs`), the group's logit g{r}. */
export function keyPhase(plan: PackedPlan): string {
  const { template, queries } = plan;
  const { rotated } = template.format;
  return `${foldQueries(plan)}
    workgroupBarrier();
${keyProducts(plan)}
    ${rotated ? "let norm = unpack2x16float(cNorm >> ((lane & 1u) * 16u)).x;" : ""}
${each(
  queries,
  (r) => `    let logit${r} = ${rotated ? `fma(s${r}, k${r}Back, zero${r}) * norm` : `s${r} * k${r}Back`};
    let best${r} = laneMax(logit${r}, lane); let p${r} = exp2(logit${r} - best${r}); let g${r} = best${r}${rotated ? "" : ` + zero${r}`};
    probs[${r * 8}u + lane / 4u][lane & 3u] = p${r};`,
)}`;
}
