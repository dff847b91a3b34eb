/** WGSL of the packed decode kernel: logits of 32 tokens from K codes. See kv-decode-packed.wgsl.ts. */
import { each, range } from "./kv-attention-template.ts";
import { DECODE_LANES } from "./kv-decode-lanes.ts";
import { largest, metaText, type PackedPlan, powersText } from "./kv-decode-packed-plan.ts";

/** Adds the lanes' parts of `parts` tokens, so that part i has token i: s{r}. Halves: pairs of f16, one exchange for both. */
function scatterLogits(r: number, parts: number, halves: boolean): string {
  let names = range(parts).map((i) => `${halves ? "acc" : "s"}${r}_${i}`);
  const text: string[] = [];
  for (let mask = 1; mask < parts; mask *= 2) {
    const next = range(names.length / 2).map((i) => `t${r}_${mask}_${i}`);
    next.forEach((name, i) => {
      const [even, odd] = [names[2 * i], names[2 * i + 1]];
      const send = `select(${odd}, ${even}, keyOdd${mask})`;
      const received = halves ? `laneXorHalves(${send}, ${mask}u, lane)` : `laneXor(${send}, ${mask}u, lane)`;
      text.push(`let ${name} = select(${even}, ${odd}, keyOdd${mask}) + ${received};`);
    });
    names = next;
  }
  if (!halves) return `${text.join(" ")} let s${r} = ${names[0]};`;
  return `${text.join(" ")} let h${r} = vec2f(${names[0]}); let s${r} = h${r}.x + h${r}.y;`;
}

/** Statements that add the products of a word's codes with q to acc{r} of one token. `word` is a vector's component. */
function wordProducts({ queries, key }: PackedPlan, word: string, sum: (r: number) => string): string {
  return `${key.prepare("w", word)} ${each(key.pairs, (i) => `let e${i} = ${key.pair("w", i)};`, " ")}
        ${each(
          queries,
          (r) =>
            each(
              key.pairs,
              (i) => `${sum(r)} = fma(bitcast<vec2<f16>>(f${r}_${i >> 2}.${"xyzw"[i & 3]}), e${i}, ${sum(r)});`,
              " ",
            ),
          "\n        ",
        )}`;
}

/** s{r}_{t}: the lane's part of the logits of its tokens, or as pairs acc{r}_{t} where halves meet. */
function keyProducts(plan: PackedPlan, halves: boolean): string {
  const { template, d, queries, key, keyParts, laneWords, rolled } = plan;
  const chunks = d / 8 + keyParts;
  const perWord = key.pairs / 4;
  // Sums of codes that carry an offset are large: f32 takes each word's.
  const everyWord = template.form === "offset";
  const folded = (w: string) =>
    each(
      queries,
      (r) => each(perWord, (c) => `let f${r}_${c} = folded[${r * chunks + c}u + ${w} + foldedAt];`, " "),
      " ",
    );
  const take = (to: string, sum: string) => `{ let both = vec2f(${sum}); ${to} += both.x + both.y; }`;
  if (rolled) {
    const vector = laneWords === 2 ? "vec2u" : "vec4u";
    return `    var keyWords = array<${vector}, ${keyParts}>(${each(keyParts, (t) => `cKey${t}`, ", ")});
    ${each(queries, (r) => `var sums${r} = array<f32, ${keyParts}>(); var accs${r} = array<vec2<f16>, ${keyParts}>();`, " ")}
    for (var i = 0u; i < ${laneWords}u * params.one; i++) {
      ${folded(`i * ${perWord}u`)}
      for (var t = 0u; t < ${keyParts}u * params.one; t++) {
        ${each(queries, (r) => `var acc${r} = accs${r}[t];`, " ")}
        ${wordProducts(plan, "keyWords[t][i]", (r) => `acc${r}`)}
        ${each(queries, (r) => (everyWord ? take(`sums${r}[t]`, `acc${r}`) : `accs${r}[t] = acc${r};`), " ")}
      }
    }
    ${each(queries, (r) => each(keyParts, (t) => `let acc${r}_${t} = accs${r}[${t}]; var s${r}_${t} = sums${r}[${t}]; ${everyWord || halves ? "" : take(`s${r}_${t}`, `acc${r}_${t}`)}`, " "), " ")}`;
  }
  const word = (w: number) => `    { ${folded(`${w * perWord}u`)}
${each(
  keyParts,
  (t) => `      { ${everyWord ? each(queries, (r) => `acc${r}_${t} = vec2<f16>();`, " ") : ""}
        ${wordProducts(plan, `cKey${t}.${"xyzw"[w]}`, (r) => `acc${r}_${t}`)}
        ${everyWord || (w === laneWords - 1 && !halves) ? each(queries, (r) => take(`s${r}_${t}`, `acc${r}_${t}`), " ") : ""} }`,
)} }`;
  return `    ${each(queries, (r) => each(keyParts, (t) => `var s${r}_${t} = 0.0; var acc${r}_${t} = vec2<f16>();`, " "), " ")}
${range(laneWords).map(word).join("\n")}`;
}

/** Folds the group's scales and zeros into q: `folded`, zero{r}, and k{r}Back, which undoes the scaling of `folded`. */
function foldQueries({ d, queries, key, keyParts, metaLanes }: PackedPlan): string {
  const chunks = d / 8 + keyParts;
  const mine = (text: string) => (metaLanes < DECODE_LANES ? `select(0.0, ${text}, lane < ${metaLanes}u)` : text);
  return `    ${metaText("k", "cKeyMeta", key.base)}
${each(
  queries,
  (r) => `    let x${r} = q${r} * kScale; let y${r} = abs(x${r});
    ${powersText(`k${r}`, largest(`y${r}`), key)}
    { let a = x${r}.xy * (k${r}Raise * place0); let b = x${r}.zw * (k${r}Raise * place1);
      let at = ${r * chunks}u + metaLane / 2u + metaLane / ${d / 4 / keyParts}u; let half = (metaLane & 1u) * 2u;
      folded[at][half] = bitcast<u32>(vec2<f16>(a)); folded[at][half + 1u] = bitcast<u32>(vec2<f16>(b)); }
    let zero${r} = laneSum(${mine(`dot(q${r}, kZero)`)}, lane);`,
)}`;
}

/** Logits, relative weights p{r} (also in `probs`), the group's logit g{r}. */
export function keyPhase(plan: PackedPlan): string {
  const { template, queries, keyParts } = plan;
  const { rotated } = template.format;
  const halves = template.halfSums === true && template.form !== "offset";
  return `${foldQueries(plan)}
    workgroupBarrier();
${keyProducts(plan, halves)}
    ${rotated ? "let norm = unpack2x16float(cNorm >> ((token & 1u) * 16u)).x;" : ""}
${each(
  queries,
  (r) => `    ${scatterLogits(r, keyParts, halves)}
    let logit${r} = ${rotated ? `fma(s${r}, k${r}Back, zero${r}) * norm` : `s${r} * k${r}Back`};
    let best${r} = laneMax(logit${r}, lane); let p${r} = exp2(logit${r} - best${r}); let g${r} = best${r}${rotated ? "" : ` + zero${r}`};
    probs[${r * 8}u + token / 4u][token & 3u] = p${r};`,
)}`;
}
