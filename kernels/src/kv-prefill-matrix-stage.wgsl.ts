/**
 * WGSL that brings one group of 32 tokens into workgroup memory as f16 rows: sealed tokens unpacked (code * scale +
 * zero, times the key's norm), f16 tokens copied. Loads and stores are apart, so that loads can be issued early. The order
 * of channels in a row is that of `channelAt`.
 */
import { each } from "./kv-attention-template.ts";
import type { KvBits } from "./kv-format.ts";
import { kvPageLayout } from "./kv-layout.ts";
import { KEY_TILE, type PrefillMatrixTemplate, prefillMatrixSizes } from "./kv-prefill-matrix-plan.ts";

/** Text of parts: variables (once, before the loop), loads into them, and stores of what they hold. */
export interface Staging {
  readonly declarations: string;
  readonly loads: string;
  /** Loads of scales and zeros, where they are not among `loads`. */
  readonly metaLoads?: string;
  readonly stores: string;
}

/** Module-scope functions of the stores. */
export function stagingFunctions({ arithmetic }: PrefillMatrixTemplate): string {
  const pairs = `
fn lowPair(a: u32, b: u32) -> u32 { return (a & 0xffffu) | (b << 16u); }
fn highPair(a: u32, b: u32) -> u32 { return (a >> 16u) | (b & 0xffff0000u); }`;
  if (arithmetic === "f16") {
    // 0x6400 is 1024: its last bits count ones, so that code | 0x6400 is 1024 + code, exactly.
    return `${pairs}
fn unpacked(codes: u32, scale: u32, zero: u32) -> u32 {
  let code = bitcast<vec2<f16>>(codes | 0x64006400u) - vec2<f16>(1024.0h);
  return bitcast<u32>(fma(code, bitcast<vec2<f16>>(scale), bitcast<vec2<f16>>(zero)));
}
fn unpackedTimes(codes: u32, scale: u32, zero: u32, factor: u32) -> u32 {
  return bitcast<u32>(bitcast<vec2<f16>>(unpacked(codes, scale, zero)) * bitcast<vec2<f16>>(factor));
}`;
  }
  return `${pairs}
fn unpackedSum(codes: u32, scale: u32, zero: u32) -> vec2f {
  return fma(vec2f(f32(codes & 0xffffu), f32(codes >> 16u)), unpack2x16float(scale), unpack2x16float(zero));
}
fn unpacked(codes: u32, scale: u32, zero: u32) -> u32 { return pack2x16float(unpackedSum(codes, scale, zero)); }
fn unpackedTimes(codes: u32, scale: u32, zero: u32, factor: u32) -> u32 {
  return pack2x16float(unpackedSum(codes, scale, zero) * unpack2x16float(factor));
}`;
}

const VECTOR = ["x", "y", "z", "w"];
const ZERO = "vec4<u32>()";
const mask = (bits: KvBits) => `0x${((2 ** bits - 1) * 0x10001).toString(16).padStart(8, "0")}u`;

/** Text: word `index` (text) of the pages, which are bound as vec4s. */
const word = (index: string) => `pages[(${index}) >> 2u][(${index}) & 3u]`;

interface Tasks {
  readonly rounds: number;
  readonly declarations: string;
  /** Text: `body` where round j has a task. */
  guard(j: number, body: string): string;
  /** What the rounds do together. */
  staging(parts: Staging): Staging;
}

/**
 * Rounds in which all threads take tasks 0 ... count - 1: task `${name}j` is thread + j * threads, kept in range. Software
 * drivers get a loop of one round, where loads need not be early: they compile that sooner.
 */
function tasks(template: PrefillMatrixTemplate, name: string, count: number): Tasks {
  const { threads } = prefillMatrixSizes(template);
  const rounds = Math.ceil(count / threads);
  const exact = count % threads === 0;
  if (template.dialect === "emulated" && template.plan.loads === "late" && rounds > 1) {
    return {
      rounds: 1,
      declarations: "",
      guard: (_, body) => `if (thread + round * ${threads}u < ${count}u) { ${body} }`,
      staging: ({ declarations, loads, stores }) => ({
        declarations: "",
        loads: "",
        stores: `for (var round = 0u; round < ${rounds}u * params.one; round++) {
    let ${name}0 = min(thread + round * ${threads}u, ${count - 1}u);
${declarations}
${loads}
${stores} }`,
      }),
    };
  }
  const declarations = each(rounds, (j) => {
    const at = `(thread + ${j * threads}u)`;
    return `  let ${name}${j} = ${exact ? at : `min(${at}, ${count - 1}u)`};`;
  });
  return {
    rounds,
    declarations,
    guard: (j, body) => (exact ? body : `if (thread + ${j * threads}u < ${count}u) { ${body} }`),
    staging: (parts) => parts,
  };
}

/** vec4s of the pairs of one word of codes: two for 2 bits, one for 4 bits. */
function unpackWord(bits: 2 | 4, pair: (codes: string, i: number) => string, codes: string): string[] {
  return Array.from({ length: 4 / bits }, (_, half) => {
    const parts = each(4, (i) => pair(`(${codes} >> ${bits * (half * 4 + i)}u) & ${mask(bits)}`, half * 4 + i), ", ");
    return `vec4<u32>(${parts})`;
  });
}

/** Where the vec4s of word `w` go in a row: 2-bit words in two runs. */
const runs = (bits: 2 | 4, words: number) => (bits === 2 ? [0, words] : [0]);

/**
 * A group of sealed keys. `keyPage` (word of this head's part of the page), `keyNorms` (word) and `keyGroup` (of the page)
 * are names of values. @param base text: first vec4 of the rows in `kv`.
 */
export function sealedKeys(template: PrefillMatrixTemplate, base: string): Staging {
  const bits = template.format.keyBits;
  return bits === 16 ? halfPageKeys(template, base) : packedKeys(template, base, bits);
}

function packedKeys(template: PrefillMatrixTemplate, base: string, bits: 2 | 4): Staging {
  const { format, shape } = template;
  const { d, rowVectors, threads } = prefillMatrixSizes(template);
  const layout = kvPageLayout(format, shape);
  const words = (d * bits) / 32;
  const task = tasks(template, "keyTask", KEY_TILE * words);
  // Where threads are a multiple of a row's words, a thread has the same channels in every round.
  const sets = threads % words === 0 ? 1 : task.rounds;
  const metaVectors = 8 / bits;
  const width = words % 4 === 0 ? "4u" : `min(4u, ${words}u - (w / 4u) * 4u)`;
  const metaWord = (set: number, at: number) => `keyMeta${set}_${at >> 2}.${VECTOR[at & 3]}`;
  const metaLoads = each(sets, (set) =>
    each(
      metaVectors,
      (k) =>
        `    keyMeta${set}_${k} = pages[((keyPage + ${layout.keyMeta}u + keyGroup * ${d}u) >> 2u) + (keyTask${set} % ${words}u) * ${metaVectors}u + ${k}u];`,
    ),
  );
  const load = (j: number) => `    { let w = keyTask${j} % ${words}u; let t = keyTask${j} / ${words}u;
      let at = keyPage + ${layout.keyCodes}u + keyGroup * ${words * KEY_TILE}u + (w / 4u) * 128u + t * ${width} + w % 4u;
      key${j} = ${word("at")};
      ${format.rotated ? `let normAt = keyNorms + keyGroup * ${KEY_TILE / 2}u + (t >> 1u); norm${j} = ${word("normAt")};` : ""} }`;
  const pairs = each(sets, (set) =>
    each(16 / bits, (i) => {
      const [a, b] = [metaWord(set, 2 * i), metaWord(set, 2 * i + 1)];
      return `    let keyScale${set}_${i} = lowPair(${a}, ${b}); let keyZero${set}_${i} = highPair(${a}, ${b});`;
    }),
  );
  const store = (j: number) => {
    const set = sets === 1 ? 0 : j;
    const pair = (codes: string, i: number) => {
      const rest = `keyScale${set}_${i}, keyZero${set}_${i}`;
      return format.rotated ? `unpackedTimes(${codes}, ${rest}, norm)` : `unpacked(${codes}, ${rest})`;
    };
    const vectors = unpackWord(bits, pair, `key${j}`);
    const norm = format.rotated
      ? `let norm = ((norm${j} >> (16u * ((keyTask${j} / ${words}u) & 1u))) & 0xffffu) * 0x10001u;`
      : "";
    const write = runs(bits, words).map((run, h) => `kv[at + ${run}u] = ${vectors[h]};`);
    return task.guard(
      j,
      `{ ${norm} let at = ${base} + (keyTask${j} / ${words}u) * ${rowVectors}u + keyTask${j} % ${words}u;
      ${write.join("\n      ")} }`,
    );
  };
  return task.staging({
    declarations: `${task.declarations}
${each(sets, (set) => each(metaVectors, (k) => `  var keyMeta${set}_${k} = ${ZERO};`, ""))}
${each(task.rounds, (j) => `  var key${j} = 0u; ${format.rotated ? `var norm${j} = 0u;` : ""}`)}`,
    loads: template.plan.loads === "mixed" ? each(task.rounds, load) : `${metaLoads}\n${each(task.rounds, load)}`,
    ...(template.plan.loads === "mixed" ? { metaLoads } : {}),
    stores: `${pairs}\n    ${each(task.rounds, store)}`,
  });
}

/** f16 keys of a page: columns of four words are vec4s, [column][token]. */
function halfPageKeys(template: PrefillMatrixTemplate, base: string): Staging {
  const { d, rowVectors } = prefillMatrixSizes(template);
  const { keyCodes } = kvPageLayout(template.format, template.shape);
  const columns = d / 8;
  const task = tasks(template, "keyTask", KEY_TILE * columns);
  return task.staging({
    declarations: `${task.declarations}\n${each(task.rounds, (j) => `  var key${j} = ${ZERO};`)}`,
    loads: each(
      task.rounds,
      (j) =>
        `    key${j} = pages[((keyPage + ${keyCodes}u) >> 2u) + keyGroup * ${KEY_TILE * columns}u + (keyTask${j} % ${columns}u) * ${KEY_TILE}u + keyTask${j} / ${columns}u];`,
    ),
    stores: each(task.rounds, (j) =>
      task.guard(
        j,
        `kv[${base} + (keyTask${j} / ${columns}u) * ${rowVectors}u + keyTask${j} % ${columns}u] = key${j};`,
      ),
    ),
  });
}

/** A group of sealed values; names as in {@link sealedKeys}, with `value` for `key`. */
export function sealedValues(template: PrefillMatrixTemplate, base: string): Staging {
  const bits = template.format.valueBits;
  return bits === 16 ? halfPageValues(template, base) : packedValues(template, base, bits);
}

function packedValues(template: PrefillMatrixTemplate, base: string, bits: 2 | 4): Staging {
  const { d, rowVectors } = prefillMatrixSizes(template);
  const layout = kvPageLayout(template.format, template.shape);
  const words = (d * bits) / 32;
  const task = tasks(template, "valueTask", KEY_TILE * words);
  const load = (
    j: number,
  ) => `    { let w = valueTask${j} % ${words}u; let t = valueTask${j} / ${words}u; let quad = valueGroup * ${KEY_TILE / 4}u + (t >> 2u);
      let at = valuePage + ${layout.valueCodes}u + (quad * ${words}u + w) * 4u + (t & 3u); value${j} = ${word("at")};
      let metaAt = valuePage + ${layout.valueMeta}u + (quad * ${d / 32}u + w / ${bits === 2 ? 2 : 4}u) * 4u + (t & 3u); valueMeta${j} = ${word("metaAt")}; }`;
  const store = (j: number) => {
    const vectors = unpackWord(bits, (codes) => `unpacked(${codes}, scale, zero)`, `value${j}`);
    const write = runs(bits, words).map((run, h) => `kv[at + ${run}u] = ${vectors[h]};`);
    return task.guard(
      j,
      `{ let scale = (valueMeta${j} & 0xffffu) * 0x10001u; let zero = (valueMeta${j} >> 16u) * 0x10001u;
      let at = ${base} + (valueTask${j} / ${words}u) * ${rowVectors}u + valueTask${j} % ${words}u;
      ${write.join("\n      ")} }`,
    );
  };
  return task.staging({
    declarations: `${task.declarations}\n${each(task.rounds, (j) => `  var value${j} = 0u; var valueMeta${j} = 0u;`)}`,
    loads: each(task.rounds, load),
    stores: `    ${each(task.rounds, store)}`,
  });
}

/** f16 values of a page: the same word of four tokens lies side by side, so four vec4s are four words of four tokens. */
function halfPageValues(template: PrefillMatrixTemplate, base: string): Staging {
  const { d, rowVectors } = prefillMatrixSizes(template);
  const { valueCodes } = kvPageLayout(template.format, template.shape);
  const columns = d / 8;
  const task = tasks(template, "valueTask", (KEY_TILE / 4) * columns);
  const load = (j: number) =>
    each(
      4,
      (k) =>
        `    value${j}_${k} = pages[((valuePage + ${valueCodes}u) >> 2u) + (valueGroup * ${KEY_TILE / 4}u + valueTask${j} / ${columns}u) * ${d / 2}u + (valueTask${j} % ${columns}u) * 4u + ${k}u];`,
    );
  const store = (j: number) =>
    each(
      4,
      (t) =>
        `kv[${base} + ((valueTask${j} / ${columns}u) * 4u + ${t}u) * ${rowVectors}u + valueTask${j} % ${columns}u] = vec4<u32>(${each(4, (k) => `value${j}_${k}.${VECTOR[t]}`, ", ")});`,
      "\n    ",
    );
  return task.staging({
    declarations: `${task.declarations}\n${each(task.rounds, (j) => each(4, (k) => `  var value${j}_${k} = ${ZERO};`, ""))}`,
    loads: each(task.rounds, load),
    stores: each(task.rounds, (j) => task.guard(j, store(j))),
  });
}

/**
 * f16 rows of the window, in the order that sealed tokens of the format have: `keyFirst` or `valueFirst` is the group's
 * first token, `last` the last one that exists.
 */
export function windowRows(template: PrefillMatrixTemplate, side: "key" | "value", base: string): Staging {
  const { shape, format } = template;
  const { d, rowVectors } = prefillMatrixSizes(template);
  const bits = side === "key" ? format.keyBits : format.valueBits;
  const plane = (shape.kvHeads * shape.headDim) / 8;
  const vectors = bits === 2 ? 2 : 1;
  const columns = d / 8 / vectors;
  const task = tasks(template, `${side}Row`, KEY_TILE * columns);
  const name = (j: number, k: number) => `${side}Half${j}_${k}`;
  const load = (
    j: number,
  ) => `    { let at = halfBase + ${side === "key" ? 0 : plane}u + min(${side}First + ${side}Row${j} / ${columns}u, last) * ${2 * plane}u + (${side}Row${j} % ${columns}u) * ${vectors}u;
      ${each(vectors, (k) => `${name(j, k)} = kvRows[at + ${k}u];`, " ")} }`;
  const store = (j: number) => {
    const at = `${base} + (${side}Row${j} / ${columns}u) * ${rowVectors}u + ${side}Row${j} % ${columns}u`;
    const [a, b] = [name(j, 0), name(j, 1)];
    const pairs = (low: readonly string[], high: readonly string[]) =>
      `vec4<u32>(${low.map((x, i) => `lowPair(${x}, ${high[i]}), highPair(${x}, ${high[i]})`).join(", ")})`;
    if (bits === 16) return task.guard(j, `kv[${at}] = ${a};`);
    if (bits === 4) return task.guard(j, `kv[${at}] = ${pairs([`${a}.x`, `${a}.y`], [`${a}.z`, `${a}.w`])};`);
    const first = pairs([`${a}.x`, `${a}.y`], [`${b}.x`, `${b}.y`]);
    const second = pairs([`${a}.z`, `${a}.w`], [`${b}.z`, `${b}.w`]);
    return task.guard(j, `kv[${at}] = ${first}; kv[${at} + ${columns}u] = ${second};`);
  };
  return task.staging({
    declarations: `${task.declarations}\n${each(task.rounds, (j) => each(vectors, (k) => `  var ${name(j, k)} = ${ZERO};`, ""))}`,
    loads: each(task.rounds, load),
    stores: `    ${each(task.rounds, store)}`,
  });
}
