/**
 * The named formats of sealed KV blocks: how many bits a code has, and whether K and V are rotated before they are
 * quantized. The quantizer is KIVI's (arXiv 2402.02750); rotation and token norms follow OScaR (arXiv 2605.19660).
 */

/** Bits of one stored element; 16 means IEEE half, unquantized. */
export type KvBits = 2 | 4 | 16;

export interface KvFormat {
  /** The name users write: "f16", "kivi4", "kivi2", "kivi2r", ... */
  readonly name: string;
  /** Stable identity, part of every block's hash chain: layout version, bits and rotation. */
  readonly id: number;
  readonly keyBits: KvBits;
  readonly valueBits: KvBits;
  /** Elements that share one scale and zero point: tokens of a channel for K, channels of a token for V. */
  readonly groupSize: 32;
  /** K and V of each head are multiplied by the orthonormal Hadamard matrix and K tokens divided by their norm. */
  readonly rotated: boolean;
}

/** One model's KV geometry. All counts are elements or tokens, not bytes. */
export interface KvShape {
  readonly layers: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Tokens of one block (page). */
  readonly blockTokens: number;
  /** Capacity of the f16 residual window; sealing happens when it is full. */
  readonly residualTokens: number;
}

/** Raised whenever the byte layout of kv-layout.ts changes; it is the top byte of every format id. */
export const KV_LAYOUT_VERSION = 1;

/** Elements per scale and zero point. */
export const KV_GROUP = 32;

export const DEFAULT_KV_FORMAT = "kivi2r";

function define(name: string, keyBits: KvBits, valueBits: KvBits, rotated: boolean): KvFormat {
  const id = ((KV_LAYOUT_VERSION << 24) | (keyBits << 16) | (valueBits << 8) | (rotated ? 1 : 0)) >>> 0;
  return { name, id, keyBits, valueBits, groupSize: KV_GROUP, rotated };
}

const FORMATS: ReadonlyMap<string, KvFormat> = new Map(
  [
    define("f16", 16, 16, false),
    define("kivi4", 4, 4, false),
    define("kivi2", 2, 2, false),
    define("kivi4r", 4, 4, true),
    define("kivi2r", 2, 2, true),
    define("kivi-k4v2", 4, 2, false),
    define("kivi-k4v2r", 4, 2, true),
    define("kivi-k2v4", 2, 4, false),
  ].map((format) => [format.name, format]),
);

export const KV_FORMAT_NAMES: readonly string[] = [...FORMATS.keys()];

/** Looks a format up by name. @throws RangeError naming the known formats. */
export function kvFormat(name: string): KvFormat {
  const format = FORMATS.get(name);
  if (format === undefined) {
    throw new RangeError(`unknown KV format "${name}": known are ${KV_FORMAT_NAMES.join(", ")}`);
  }
  return format;
}

function requirePositive(name: string, value: number): void {
  if (!Number.isInteger(value) || value <= 0)
    throw new RangeError(`${name} is ${value}: it must be a positive integer`);
}

/**
 * Checks that a format can hold a shape.
 * @throws RangeError saying which number is wrong and what is allowed.
 */
export function validateKv(format: KvFormat, shape: KvShape): void {
  for (const name of ["layers", "kvHeads", "headDim", "blockTokens", "residualTokens"] as const) {
    requirePositive(name, shape[name]);
  }
  const { headDim, blockTokens, residualTokens } = shape;
  const { groupSize } = format;
  const quantized = format.keyBits < 16 || format.valueBits < 16;
  if (quantized && headDim % groupSize !== 0) {
    throw new RangeError(
      `headDim ${headDim} is not a multiple of ${groupSize}: format ${format.name} needs that; use f16`,
    );
  }
  if (headDim % 8 !== 0) throw new RangeError(`headDim ${headDim} is not a multiple of 8`);
  // Sealing holds a group of 32 tokens of one head in workgroup memory, of which portable devices have 32 KiB.
  const largest = quantized ? 128 : 256;
  if (headDim > largest) {
    throw new RangeError(`headDim ${headDim} is over ${largest}, the largest that format ${format.name} supports`);
  }
  if (format.rotated && (headDim & (headDim - 1)) !== 0) {
    throw new RangeError(`headDim ${headDim} is not a power of two: rotated format ${format.name} needs that`);
  }
  if (blockTokens % groupSize !== 0) {
    throw new RangeError(`blockTokens ${blockTokens} is not a multiple of ${groupSize}`);
  }
  if (residualTokens % blockTokens !== 0) {
    throw new RangeError(`residualTokens ${residualTokens} is not a multiple of blockTokens ${blockTokens}`);
  }
}
