/**
 * Text of what sealing's tiles do with the 32 channels that a thread has in registers, x: load, rotate, divide by the norm,
 * find the range of channels, and make words of codes.
 */
import { codesPerWord } from "./kv-layout.ts";
import { type RegisterIndex, type RegisterWriter, registerWriter } from "./registers.wgsl.ts";

/** How threads exchange values: by subgroups of exactly 32, or through workgroup memory, which runs everywhere. */
export type LaneExchange = "subgroup" | "memory";

/** Values of a thread. */
export const COUNT = 32;

/** What the text of one branch is written with. */
export interface TileWriter extends RegisterWriter {
  /** Whether text is written out; looped text is also written once where unrolled text has a fast and a full form. */
  readonly unroll: boolean;
  /** Statements that make `to` i, i < count, of what the thread `mask` away has for `value(i)`. */
  exchange(mask: number, count: number, value: (index: RegisterIndex) => string, to: string): string;
}

/** @param unroll writes everything out; otherwise loops, for drivers that compile slowly. */
export function tileWriter(exchange: LaneExchange, unroll: boolean): TileWriter {
  const registers = registerWriter(unroll);
  const { each, at } = registers;
  return {
    ...registers,
    unroll,
    exchange(mask, count, value, to) {
      if (exchange === "subgroup") {
        return each(count, (i) => `${at(to, i)} = subgroupShuffleXor(${value(i)}, ${mask}u);`);
      }
      return `  workgroupBarrier();
${each(count, (i) => `lanes[tid * ${COUNT}u + ${i}] = ${value(i)};`)}
  workgroupBarrier();
${each(count, (i) => `${at(to, i)} = lanes[(tid ^ ${mask}u) * ${COUNT}u + ${i}];`)}`;
    },
  };
}

/** Loads the thread's 32 halves into x, and raises `flagBit` where one is not finite, unless the rotation will tell. */
export function loadText(w: TileWriter, begin: string, flagBit: number, rotated: boolean): string {
  const pairs = [0, 1, 2, 3].flatMap((v) =>
    [0, 1, 2, 3].map((c) => {
      const i = 8 * v + 2 * c;
      return `{ let h = unpack2x16float(w${v}.${"xyzw"[c]}); ${w.at("x", i)} = h.x; ${w.at("x", i + 1)} = h.y; }`;
    }),
  );
  return `  let firstVector = (${begin}) / 4u;
${[0, 1, 2, 3].map((v) => `  let w${v} = source[firstVector + ${v}u];`).join("\n")}
${
  rotated
    ? ""
    : `  // An exponent of all ones carries into the sign's place.
  var overflow = vec4u();
${[0, 1, 2, 3].map((v) => `  overflow |= (w${v} & vec4u(0x7c007c00u)) + vec4u(0x04000400u);`).join("\n")}
  if (((overflow.x | overflow.y | overflow.z | overflow.w) & 0x80008000u) != 0u) { atomicOr(&status[slot], ${flagBit}u); }`
}
${w.declare("x", COUNT)}
  ${pairs.join("\n  ")}`;
}

/** The orthonormal Hadamard transform of x, stages 1, 2, 4, …, in the reference's order. */
export function rotateText(w: TileWriter, headDim: number, flagBit: number): string {
  const text: string[] = [w.declare("other", COUNT)];
  for (let stride = 1; stride < COUNT; stride *= 2) {
    text.push(
      w.pairs(COUNT, stride, (low, high) => {
        const [a, b] = [w.at("x", low), w.at("x", high)];
        return `{ let a = ${a}; let b = ${b}; ${a} = a + b; ${b} = a - b; }`;
      }),
    );
  }
  for (let mask = 1; mask < headDim / COUNT; mask *= 2) {
    text.push(w.exchange(mask, COUNT, (i) => w.at("x", i), "other"));
    text.push(`  let sign${mask} = select(1.0, -1.0, (tid & ${mask}u) != 0u);`);
    text.push(w.each(COUNT, (i) => `${w.at("x", i)} = fma(${w.at("x", i)}, sign${mask}, ${w.at("other", i)});`));
  }
  // Adding an unknown -0.0 keeps the product as it is, rounded: it must not be fused with a later subtraction.
  const factor = Math.fround(1 / Math.sqrt(headDim));
  text.push(w.each(COUNT, (i) => `${w.at("x", i)} = fma(${w.at("x", i)}, ${factor}, params.negativeZero);`));
  // Each of them is a sum of all: one that is not finite makes them all so.
  text.push(
    `  if ((bitcast<u32>(${w.at("x", 0)}) & 0x7f800000u) == 0x7f800000u) { atomicOr(&status[slot], ${flagBit}u); }`,
  );
  return text.join("\n");
}

/** Divides x by the token's norm, correctly rounded. */
export function divideText(w: TileWriter): string {
  return `  // Zero where the norm is: then every quotient is zero too.
  let reciprocal = reciprocalOf(divisor);
${w.each(COUNT, (i) => `${w.at("x", i)} = divideBy(${w.at("x", i)}, divisor, reciprocal);`)}`;
}

/** Quotients as on a CPU: correctly rounded, whatever the driver's division does. */
export function divisionText(fused: boolean): string {
  return fused
    ? `
fn reciprocalOf(b: f32) -> f32 {
  let rough = select(1.0 / b, 0.0, b == 0.0);
  return fma(fma(-rough, b, 1.0), rough, rough);
}
// One exact remainder corrects the product.
fn divideBy(a: f32, b: f32, reciprocal: f32) -> f32 {
  let q = a * reciprocal;
  return fma(fma(-q, b, a), reciprocal, q);
}`
    : `
fn reciprocalOf(b: f32) -> f32 { return select(1.0, 0.0, b == 0.0); }
fn divideBy(a: f32, b: f32, reciprocal: f32) -> f32 { return select(divide(a, b), 0.0, reciprocal == 0.0); }`;
}

/**
 * A code is the correctly rounded quotient, rounded half to even into the low bits by adding 1.5 · 2²³. The constant's own
 * bits are subtracted once a word.
 */
export const CODES_WGSL = `
// zero, scale, its reciprocal (0 where the scale is: then every code is 0).
fn stepsOf(both: u32) -> vec4f {
  let sz = unpack2x16float(both);
  return vec4f(sz.y, sz.x, reciprocalOf(sz.x), 0.0);
}
fn quotient(x: f32, steps: vec4f) -> f32 { return divideBy(x - steps.x, steps.y, steps.z); }
// Whether rounding scale and zero to f16 put a code of the group out of its range: then all are clamped.
fn isWide(low: f32, high: f32, steps: vec4f, top: f32) -> bool {
  return quotient(low, steps) < -0.5 || quotient(high, steps) >= top + 0.5;
}
// Drivers may divide a unit or two off; one exact remainder makes it the correctly rounded quotient, as on a CPU.
fn divide(a: f32, b: f32) -> f32 {
  let q = a / b;
  return fma(fma(-q, b, a), 1.0 / b, q);
}
fn scaleAndZero(low: f32, high: f32, top: f32) -> u32 {
  return toHalf(divide(high - low, top)) | (toHalf(low) << 16u);
}
fn eitherNotFinite(both: u32) -> bool { return halfNotFinite(both) || halfNotFinite(both >> 16u); }`;

const ROUNDING_BITS = 0x4b40_0000n;

/** Minimum and maximum of channel tid over the 32 tokens, as `low` and `high`: halved from lane to lane, then by way of memory. */
export function reduceText(w: TileWriter, headDim: number): string {
  const parts = headDim / COUNT;
  const text = [
    ...["ls", "hs", "otherLow", "otherHigh"].map((name) => w.declare(name, COUNT)),
    w.each(COUNT, (i) => `${w.at("ls", i)} = ${w.at("x", i)}; ${w.at("hs", i)} = ${w.at("x", i)};`),
  ];
  let half = COUNT / 2;
  for (let mask = 16; mask >= parts; mask /= 2) {
    const upper = `upper${mask}`;
    const sent = (name: string) => (i: RegisterIndex) =>
      `select(${w.at(name, w.plus(i, half))}, ${w.at(name, i)}, ${upper})`;
    text.push(`  let ${upper} = (tid & ${mask}u) != 0u;`);
    text.push(w.exchange(mask, half, sent("ls"), "otherLow"));
    // Before the first exchange minimum and maximum are the same.
    const same = half === COUNT / 2;
    if (!same) text.push(w.exchange(mask, half, sent("hs"), "otherHigh"));
    for (const [name, operation, from] of [
      ["ls", "min", "otherLow"],
      ["hs", "max", same ? "otherLow" : "otherHigh"],
    ] as const) {
      text.push(
        w.each(half, (i) => {
          const kept = `select(${w.at(name, i)}, ${w.at(name, w.plus(i, half))}, ${upper})`;
          return `${w.at(name, i)} = ${operation}(${kept}, ${w.at(from, i)});`;
        }),
      );
    }
    half /= 2;
  }
  text.push(
    w.each(
      parts,
      (i) =>
        `partials[(tid / 32u) * ${headDim}u + part * 32u + (tid & ${COUNT - parts}u) + ${i}] = vec2f(${w.at("ls", i)}, ${w.at("hs", i)});`,
    ),
  );
  text.push(`  if (tid == 0u) { atomicStore(&anyWide, 0u); }
  workgroupBarrier();
  var low = partials[tid].x;
  var high = partials[tid].y;
  for (var other = 1u; other < ${parts}u; other++) {
    let more = partials[other * ${headDim}u + tid];
    low = min(low, more.x);
    high = max(high, more.y);
  }`);
  return text.join("\n");
}

/** Statements that make `word` of codes word · perWord …; `steps(i)` is the group of value i. `bounds`: of the clamp, if any. */
function wordText(
  w: TileWriter,
  bits: number,
  word: number,
  steps: (i: RegisterIndex) => string,
  bounds: string | undefined,
): string {
  const perWord = codesPerWord(bits as 2 | 4);
  let constant = 0n;
  for (let j = 0; j < perWord; j++) constant += ROUNDING_BITS << BigInt(j * bits);
  return `  word = 0u;
${w.each(perWord, (j) => {
  const i = typeof j === "number" ? j + word * perWord : `${j} + ${word * perWord}u`;
  const shift = typeof j === "number" ? `${j * bits}u` : `(${j} * ${bits}u)`;
  const code = `quotient(${w.at("x", i)}, ${steps(i)})`;
  return `word += bitcast<u32>(${bounds === undefined ? code : `clamp(${code}, ${bounds})`} + 12582912.0) << ${shift};`;
})}
  word -= ${constant & 0xffff_ffffn}u;`;
}

/**
 * Statements that make all words of the thread and store them; clamped only where `isWide` says so.
 * @param store statement that stores `word` number k.
 */
export function codesText(
  w: TileWriter,
  bits: number,
  isWide: string,
  steps: (i: RegisterIndex) => string,
  store: (k: number) => string,
): string {
  const words = COUNT / codesPerWord(bits as 2 | 4);
  const top = `${2 ** bits - 1}.0`;
  const all = (bounds?: string) =>
    Array.from({ length: words }, (_, k) => `${wordText(w, bits, k, steps, bounds)}\n${store(k)}`).join("\n");
  if (!w.unroll) {
    return `  let wide = ${isWide};
  let least = select(-1e6, 0.0, wide);
  let most = select(1e6, ${top}, wide);
  var word = 0u;
${all("least, most")}`;
  }
  return `  var word = 0u;
  if (!(${isWide})) {
${all()}
  } else {
${all(`0.0, ${top}`)}
  }`;
}
