/** WGSL of attention over 32 sealed tokens: logits from K codes, output from V codes. See kv-attention.wgsl.ts. */
import { halfOutput } from "./kv-attention-half.wgsl.ts";
import { each, type Shapes } from "./kv-attention-template.ts";
import { codesPerWord, kvPageLayout } from "./kv-layout.ts";

/** Text of the f32 code at place `place` of word `word`, times 2^(bits * (place % half)). */
function maskedCode(bits: number, word: string, place: number): string {
  const half = 16 / bits;
  const mask = ((1 << bits) - 1) << (bits * (place % half));
  return `f32(i32(${place < half ? word : `(${word} >> 16u)`} & ${mask}u))`;
}

/** Factor that undoes the places of maskedCode for channel `c`: an exact power of two. */
function placeFactor(bits: number, channel: string): string {
  const half = 16 / bits;
  return bits === 16 ? "1.0" : `bitcast<f32>((127u - ${bits}u * (${channel} & ${half - 1}u)) << 23u)`;
}

/** Logits of 32 sealed tokens into s{vector}_{query}; `group` is the group in the page, `page` the head's first word. */
export function sealedLogits(s: Shapes): string {
  const { d, lanes, tokenVectors, queries, template } = s;
  const bits = template.format.keyBits;
  const { subgroups } = template.lanePlan;
  const layout = kvPageLayout(template.format, template.shape);
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const chunk = Math.max(lanes, perWord);
  const chunkWords = chunk / perWord;
  const vectors = chunk / lanes;
  const wordOf = (v: number, w: number) => `k${v}_${w}`;
  const loads = each(tokenVectors, (v) =>
    each(
      chunkWords,
      (w) => `      let ${wordOf(v, w)} = pages[keyWord(codes, ${v * lanes}u + lane, chunk * ${chunkWords}u + ${w}u)];`,
    ),
  );
  const meta =
    bits === 16
      ? ""
      : `        let inWord = c & ${perWord - 1}u;
        let sz = unpack2x16float(pages[scales + c - inWord + (inWord & ${perWord / 2 - 1}u) * 2u + inWord / ${perWord / 2}u]);
        let place = sz.x * ${subgroups ? placeFactor(bits, "c") : "1.0"};`;
  const code = (v: number, k: number) =>
    bits === 16
      ? `unpack2x16float(${wordOf(v, k >> 1)}).${k & 1 ? "y" : "x"}`
      : maskedCode(bits, wordOf(v, Math.floor(k / perWord)), k % perWord);
  const folded = (u: number) => `        let c = chunk * ${chunk}u + ${u * lanes}u + lane;
${meta}
${each(queries, (m) => `        let qv${m} = qSealed[${m * d}u + c]; let f${m} = qv${m}${bits === 16 ? "" : " * place"}; ${bits === 16 ? "" : `z${m} = fma(qv${m}, sz.y, z${m});`}`)}`;
  const multiply = (factor: (m: number) => string, value: (v: number) => string) =>
    `${each(tokenVectors, (v) => `let x${v} = ${value(v)};`, " ")}
${each(queries, (m) => `          let b${m} = ${factor(m)}; ${each(tokenVectors, (v) => `s${v}_${m} = fma(b${m}, x${v}, s${v}_${m});`, " ")}`)}`;
  const vector = (u: number) => `      {
${folded(u)}
${each(
  lanes,
  (j) =>
    `        { ${multiply(
      (m) => `subgroupBroadcast(f${m}, ${j}u)`,
      (v) => code(v, u * lanes + j),
    )} }`,
)}
      }`;
  // Without subgroup operations the factors of a chunk meet in workgroup memory, and codes are shifted down in a loop.
  const shifted = (v: number) =>
    bits === 16
      ? `unpack2x16float(${wordOf(v, 0)} >> (16u * j)).x`
      : `f32((${wordOf(v, 0)} >> (${bits}u * j)) & ${2 ** bits - 1}u)`;
  const exchanged = `      workgroupBarrier();
${each(vectors, (u) => `      {\n${folded(u)}\n${each(queries, (m) => `        exchange[${m * chunk + u * lanes}u + lane] = f${m};`)}\n      }`)}
      workgroupBarrier();
      for (var w = 0u; w < ${chunkWords}u * params.one; w++) {
${each(tokenVectors, (v) => `        let ${wordOf(v, 0)} = pages[keyWord(codes, ${v * lanes}u + lane, chunk * ${chunkWords}u + w)];`)}
        for (var j = 0u; j < ${perWord}u * params.one; j++) {
          ${multiply((m) => `exchange[${m * chunk}u + w * ${perWord}u + j]`, shifted)}
        }
      }`;
  return `    let codes = page + ${layout.keyCodes}u + group * ${words * 32}u;
    let scales = page + ${layout.keyMeta}u + group * ${d}u;
${each(tokenVectors, (v) => `    ${each(queries, (m) => `var s${v}_${m} = 0.0;`, " ")}`)}
    ${each(queries, (m) => `var z${m} = 0.0;`, " ")}
    for (var chunk = 0u; chunk < ${d / chunk}u * params.one; chunk++) {
${subgroups ? `${loads}\n${each(vectors, vector)}` : exchanged}
    }
${bits === 16 ? "" : each(queries, (m) => `    z${m} = laneSum(z${m}, lane);`)}
${each(tokenVectors, (v) => {
  const norm = template.format.rotated
    ? `    let n${v} = unpack2x16float(pages[norms + (group * 32u + ${v * lanes}u + lane) / 2u] >> ((lane & 1u) * 16u)).x;\n`
    : "";
  return `${norm}    ${each(queries, (m) => `s${v}_${m} = (s${v}_${m} + z${m})${norm ? ` * n${v}` : ""};`, " ")}`;
})}`;
}

/** Adds p * V of 32 sealed tokens to o{m}_{c} (times the place factor) and p * zero to zero{m}_{part}. */
export function sealedOutput(s: Shapes): string {
  const { d, lanes, tokenVectors, channelVectors, queries, parts, template } = s;
  const bits = template.format.valueBits;
  const layout = kvPageLayout(template.format, template.shape);
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const base = `    let values = page + ${layout.valueCodes}u + group * ${words * 32}u;\n`;
  if (bits === 16) {
    return (
      base +
      halfOutput(
        s,
        (token, channel) =>
          `pages[values + ((${token} >> 2u) * ${words}u + (${channel} >> 1u)) * 4u + (${token} & 3u)]`,
      )
    );
  }
  const half = perWord / 2;
  const fold = each(tokenVectors, (v) =>
    each(
      parts,
      (
        g,
      ) => `    { let t = ${v * lanes}u + lane; let sz = unpack2x16float(pages[values - valueShift + ((t >> 2u) * ${parts}u + ${g}u) * 4u + (t & 3u)]);
      ${each(queries, (m) => `weights[${(g * queries + m) * 32}u + t] = p${v}_${m} * sz.x; zero${m}_${g} = fma(p${v}_${m}, sz.y, zero${m}_${g});`, " ")} }`,
    ),
  );
  const shift = `    let valueShift = ${layout.valueCodes}u + group * ${words * 32}u - (${layout.valueMeta}u + group * ${d}u);`;
  const accumulate = (weight: (m: number, g: number) => string) =>
    each(
      queries,
      (m) =>
        `          { ${each(parts, (g) => `let pb${g} = ${weight(m, g)};`, " ")} ${each(channelVectors, (c) => `o${m}_${c} = fma(pb${Math.floor((c * lanes) / 32)}, v${c}, o${m}_${c});`, " ")} }`,
    );
  if (!template.lanePlan.subgroups) {
    const code = (c: number) =>
      `let v${c} = f32((pages[values + ((t >> 2u) * ${words}u + (${c * lanes}u + lane) / ${perWord}u) * 4u + (t & 3u)] >> (${bits}u * ((${c * lanes}u + lane) & ${perWord - 1}u))) & ${2 ** bits - 1}u);`;
    return `${base}${shift}
${fold}
    workgroupBarrier();
    for (var t = 0u; t < 32u * params.one; t++) {
      ${each(channelVectors, code, "\n      ")}
${accumulate((m, g) => `weights[${(g * queries + m) * 32}u + t]`)}
    }
    workgroupBarrier();`;
  }
  const vector = (v: number) => `    { let base = values + ${v * lanes * words}u;
${each(words, (w) => `      let w${w} = pages[base + ${w * lanes}u + lane];`)}
${each(
  parts,
  (
    g,
  ) => `      let sz${g} = unpack2x16float(pages[values - valueShift + ${v * (lanes / 4) * parts * 4}u + ((lane >> 2u) * ${parts}u + ${g}u) * 4u + (lane & 3u)]);
      ${each(queries, (m) => `let pw${g}_${m} = p${v}_${m} * sz${g}.x; zero${m}_${g} = fma(p${v}_${m}, sz${g}.y, zero${m}_${g});`, " ")}`,
)}
${each(
  lanes,
  (j) => `        { ${valueCodes(s, j)}
${accumulate((m, g) => `subgroupBroadcast(pw${g}_${m}, ${j}u)`)} }`,
)} }`;
  return `${base}${shift}
    let placeMask = ${2 ** bits - 1}u << (${bits}u * (lane & ${half - 1}u));
    let highShift = ((lane / ${half}u) & 1u) * 16u;
${each(tokenVectors, vector)}`;
}

/** Codes of token `j` of a vector of tokens as v{channelVector}, in place (subgroups only): words are in w0, w1, ... */
function valueCodes({ template, d, lanes, channelVectors }: Shapes, j: number): string {
  const bits = template.format.valueBits;
  const perWord = codesPerWord(bits);
  const words = d / perWord;
  const half = perWord / 2;
  // A vector of channels lies in one word if it is not longer than a word; else each lane picks its own.
  const oneWord = lanes <= perWord;
  const word = (c: number) => {
    const index = ((j >> 2) * words + Math.floor((c * lanes) / perWord)) * 4 + (j & 3);
    const loaded = Math.floor(index / lanes);
    if (oneWord) return `subgroupBroadcast(w${loaded}, ${index % lanes}u)`;
    return `subgroupShuffle(w${loaded}, (${index % lanes}u + lane / ${perWord}u * 4u) & ${lanes - 1}u)`;
  };
  const high = (text: string, c: number) => {
    if (lanes > half) return `(${text} >> highShift)`;
    return (c * lanes) % perWord >= half ? `(${text} >> 16u)` : text;
  };
  const mask = (c: number) => {
    const place = lanes < half ? (c * lanes) % half : 0;
    return place === 0 ? "placeMask" : `(placeMask << ${bits * place}u)`;
  };
  return each(
    channelVectors,
    (c) => {
      const name = `x${j}_${oneWord ? Math.floor((c * lanes) / perWord) : c}`;
      const first = !oneWord || (c * lanes) % perWord === 0;
      return `${first ? `let ${name} = ${word(c)}; ` : ""}let v${c} = f32(i32(${high(name, c)} & ${mask(c)}));`;
    },
    "\n          ",
  );
}

/** After the sealed part: places undone, zero points added; then o is in true units (still rotated). */
export function finishSealed(s: Shapes): string {
  const { lanes, channelVectors, queries, parts, template } = s;
  const bits = template.format.valueBits;
  if (bits === 16) return "";
  return `${each(queries, (m) => each(parts, (g) => `  zero${m}_${g} = laneSum(zero${m}_${g}, lane);`))}
${each(queries, (m) => each(channelVectors, (c) => `  o${m}_${c} = fma(o${m}_${c}, ${template.lanePlan.subgroups ? placeFactor(bits, `(${c * lanes}u + lane)`) : "1.0"}, zero${m}_${Math.floor((c * lanes) / 32)});`))}`;
}
