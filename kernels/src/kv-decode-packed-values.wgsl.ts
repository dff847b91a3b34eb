/** WGSL of the packed decode kernel: output from V codes, and the split's partials. See kv-decode-packed.wgsl.ts. */
import { each, range } from "./kv-attention-template.ts";
import { DECODE_LANES } from "./kv-decode-lanes.ts";
import { largest, metaText, type PackedPlan, powersText } from "./kv-decode-packed-plan.ts";
import { codesPerWord } from "./kv-layout.ts";

/** Adds one word of a token times its weight `p{r}` to h{r}_{j}. */
function wordProducts({ queries, value }: PackedPlan, word: string): string {
  return `${value.prepare("w", word)} ${each(value.pairs, (j) => `let e${j} = ${value.pair("w", j)};`, " ")}
        ${each(queries, (r) => each(value.pairs, (j) => `h${r}_${j} = fma(p${r}Pair, e${j}, h${r}_${j});`, " "), "\n        ")}`;
}

/** h{r}_{j}: weights times codes of the lane's word, in f16; then to f32 as a{r}_{j}. */
function valueProducts(plan: PackedPlan): string {
  const { queries, value, valueLoads, valueWords, parts, rolled } = plan;
  const perLoad = (32 / valueWords) * parts;
  const stored = 8 * parts;
  const clear = each(queries, (r) => each(value.pairs, (j) => `var h${r}_${j} = vec2<f16>();`, " "), " ");
  const flush = each(
    queries,
    (r) =>
      `    { let join = join${r} * vBack; ${each(value.pairs, (j) => `a${r}_${j} = fma(vec2f(h${r}_${j}), vec2f(join), a${r}_${j});`, " ")} }`,
  );
  if (rolled) {
    return `    { ${clear}
    var valueWords = array<vec4u, ${valueLoads}>(${each(valueLoads, (i) => `cValue${i}`, ", ")});
    for (var i = 0u; i < ${valueLoads}u * params.one; i++) {
      for (var t = 0u; t < 4u * params.one; t++) {
        ${each(queries, (r) => `let p${r}Pair = vec2<f16>(bitcast<vec2<f16>>(weights[${r * stored}u + i * ${perLoad}u + valueAt][t / 2u])[t & 1u]);`, " ")}
        ${wordProducts(plan, "valueWords[i][t]")}
      }
    }
${flush} }`;
  }
  const token = (i: number, t: number) =>
    `      { ${each(queries, (r) => `let p${r}Pair = vec2<f16>(w${r}${t >> 1}.${"xy"[t & 1]});`, " ")}
        ${wordProducts(plan, `cValue${i}.${"xyzw"[t]}`)} }`;
  return `    { ${clear}
${each(
  valueLoads,
  (
    i,
  ) => `    { ${each(queries, (r) => `let w${r} = weights[${r * stored + i * perLoad}u + valueAt]; let w${r}0 = bitcast<vec2<f16>>(w${r}.x); let w${r}1 = bitcast<vec2<f16>>(w${r}.y);`, " ")}
${each(4, (t) => token(i, t))} }`,
)}
${flush} }`;
}

/** Joins the group to the running sums: a{r}_{j}, z{r}, total{r}, top{r}. */
export function valuePhase(plan: PackedPlan): string {
  const { queries, value, parts } = plan;
  return `    ${metaText("v", "cValueMeta", value.base)}
    ${powersText("v", largest("vScale"), value)}
    let vRaised = vScale * vRaise;
    workgroupBarrier();
${each(
  queries,
  (
    r,
  ) => `    if (g${r} > top${r}) { let keep = exp2(top${r} - g${r}); top${r} = g${r}; total${r} *= keep; z${r} *= keep; ${each(value.pairs, (j) => `a${r}_${j} *= keep;`, " ")} }
    let join${r} = exp2(g${r} - top${r}); total${r} = fma(p${r}, join${r}, total${r});
    { let p = probs[${r * 8}u + metaLane / ${parts}u]; z${r} = fma(dot(p, vZero), join${r}, z${r}); let x = p * vRaised;
      weights[${r * 8 * parts}u + metaLane] = vec2u(bitcast<u32>(vec2<f16>(x.xy)), bitcast<u32>(vec2<f16>(x.zw))); }`,
)}
    workgroupBarrier();
${valueProducts(plan)}`;
}

/** Writes the finished split's partials and clears the sums. */
export function storePartials(plan: PackedPlan): string {
  const { template, d, queries, value, valueWords, parts } = plan;
  const { heads, shape, format } = template;
  const gqa = heads / shape.kvHeads;
  const perWord = codesPerWord(format.valueBits);
  const masks = range(Math.log2(DECODE_LANES / valueWords)).map((i) => valueWords << i);
  const exact = gqa % queries === 0;
  const scatter = (r: number) => {
    let pairs = value.pairs;
    return masks
      .map((mask, step) => {
        pairs /= 2;
        const from = step === 0 ? `a${r}_` : `o${step - 1}_`;
        return each(
          pairs,
          (i) =>
            `let o${step}_${i} = select(${from}${i}, ${from}${i + pairs}, upper${step}) + laneXor2(select(${from}${i + pairs}, ${from}${i}, upper${step}), ${mask}u, lane);`,
          " ",
        );
      })
      .join("\n        ");
  };
  const left = value.pairs >> masks.length;
  const last = masks.length - 1;
  const pairOf = masks.map((_, step) => `select(0u, ${value.pairs >> (step + 1)}u, upper${step})`).join(" + ");
  const when = (r: number, text: string) => (exact || r === 0 ? text : `if (firstQuery + ${r}u < ${gqa}u) { ${text} }`);
  return `      ${masks.map((mask, step) => `let upper${step} = (lane & ${mask}u) != 0u;`).join(" ")}
      let outChannel = (lane % ${valueWords}u) * ${perWord}u + ${pairOf};
${each(
  queries,
  (r) => `      { ${range(value.pairs)
    .filter((j) => value.place(j) !== 0)
    .map((j) => `a${r}_${j} *= ${2 ** -value.place(j)};`)
    .join(" ")}
        ${scatter(r)}
        ${each(3, (i) => `z${r} += laneXor(z${r}, ${parts << i}u, lane);`, " ")}
        let zero = laneRead(z${r}, (lane % ${valueWords}u) * ${perWord}u / 32u, lane); let total = laneSum(total${r}, lane);
        let out = ((wid.z * ${heads}u + head${r}) * params.splits + split) * ${d + 2}u;
        ${when(
          r,
          `${each(left, (i) => `partials[out + outChannel + ${i}u] = o${last}_${i}.x + zero; partials[out + outChannel + ${i + value.pairs}u] = o${last}_${i}.y + zero;`, " ")}
        if (lane == 0u) { partials[out + ${d}u] = top${r}; partials[out + ${d + 1}u] = total; }`,
        )}
        top${r} = -1.0e30; total${r} = 0.0; z${r} = 0.0; ${each(value.pairs, (j) => `a${r}_${j} = vec2f();`, " ")} }`,
)}`;
}
