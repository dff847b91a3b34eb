/**
 * Text that works on 32 values of a thread: unrolled, so that they are registers, or as loops over an array, for software
 * drivers, which compile long texts slowly. The same statements come out of both.
 */

/** Index of a value: a number where unrolled, a text in a loop. */
export type RegisterIndex = number | string;

export interface RegisterWriter {
  /** Declares `name`, `count` f32 values of zero. */
  declare(name: string, count: number): string;
  /** Text of one value. */
  at(name: string, index: RegisterIndex): string;
  /** `index` + `offset`. */
  plus(index: RegisterIndex, offset: number): RegisterIndex;
  /** Statements for indices 0 … count − 1. */
  each(count: number, statement: (index: RegisterIndex) => string): string;
  /** Statements for the pairs (i, i + stride) of `count` values: the butterflies of one stage. */
  pairs(count: number, stride: number, statement: (low: RegisterIndex, high: RegisterIndex) => string): string;
}

const unrolled: RegisterWriter = {
  declare: (name, count) => Array.from({ length: count }, (_, i) => `  var ${name}${i} = 0.0;`).join("\n"),
  at: (name, index) => `${name}${index}`,
  plus: (index, offset) => (index as number) + offset,
  each: (count, statement) => Array.from({ length: count }, (_, i) => `  ${statement(i)}`).join("\n"),
  pairs: (count, stride, statement) =>
    Array.from({ length: count }, (_, i) => i)
      .filter((i) => (i & stride) === 0)
      .map((i) => `  ${statement(i, i + stride)}`)
      .join("\n"),
};

const looped: RegisterWriter = {
  declare: (name, count) => `  var ${name} = array<f32, ${count}>();`,
  at: (name, index) => `${name}[${index}]`,
  plus: (index, offset) => `${index} + ${offset}u`,
  each: (count, statement) => `  for (var i = 0u; i < ${count}u; i++) { ${statement("i")} }`,
  pairs: (count, stride, statement) =>
    `  for (var i = 0u; i < ${count / 2}u; i++) { let p = i / ${stride}u * ${2 * stride}u + i % ${stride}u; ${statement("p", `p + ${stride}u`)} }`,
};

export function registerWriter(unroll: boolean): RegisterWriter {
  return unroll ? unrolled : looped;
}
