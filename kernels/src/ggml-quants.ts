/**
 * Host decoder of the ggml block formats that GGUF files carry: the reference that repacked weights are tested against.
 *
 * All multi-byte fields are little-endian. A block holds 32 elements (K formats: 256) that are consecutive in a row.
 */
import { halfToFloat } from "./half.ts";

export type GgmlType = "F32" | "F16" | "BF16" | "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1" | "Q8_0" | "Q4_K" | "Q5_K" | "Q6_K";

export interface GgmlBlock {
  /** Elements of one block. */
  readonly elements: number;
  /** Bytes of one block. */
  readonly bytes: number;
}

const BLOCKS: Record<GgmlType, GgmlBlock> = {
  F32: { elements: 1, bytes: 4 },
  F16: { elements: 1, bytes: 2 },
  BF16: { elements: 1, bytes: 2 },
  Q4_0: { elements: 32, bytes: 18 },
  Q4_1: { elements: 32, bytes: 20 },
  Q5_0: { elements: 32, bytes: 22 },
  Q5_1: { elements: 32, bytes: 24 },
  Q8_0: { elements: 32, bytes: 34 },
  Q4_K: { elements: 256, bytes: 144 },
  Q5_K: { elements: 256, bytes: 176 },
  Q6_K: { elements: 256, bytes: 210 },
};

/** Names of every type that can be decoded. */
export const GGML_TYPES: readonly GgmlType[] = Object.keys(BLOCKS) as GgmlType[];

/** Shape of one block of `type`. */
export function ggmlBlock(type: GgmlType): GgmlBlock {
  return BLOCKS[type];
}

/**
 * Bytes of `elements` consecutive elements.
 * @throws RangeError unless `elements` is a multiple of the block.
 */
export function ggmlByteLength(type: GgmlType, elements: number): number {
  const block = BLOCKS[type];
  if (!Number.isInteger(elements) || elements < 0 || elements % block.elements !== 0) {
    throw new RangeError(`${type}: ${elements} elements, must be a multiple of ${block.elements}`);
  }
  return (elements / block.elements) * block.bytes;
}

type BlockDecoder = (view: DataView, offset: number, out: Float32Array, at: number) => void;

function half(view: DataView, offset: number): number {
  return halfToFloat(view.getUint16(offset, true));
}

/** Four-bit codes of 32 elements: byte j holds element j (low nibble) and element j + 16 (high nibble). */
function decodeNibbles(
  scale: number,
  zero: number,
  view: DataView,
  offset: number,
  out: Float32Array,
  at: number,
): void {
  for (let j = 0; j < 16; j++) {
    const byte = view.getUint8(offset + j);
    out[at + j] = scale * (byte & 15) + zero;
    out[at + j + 16] = scale * (byte >> 4) + zero;
  }
}

/** Five-bit codes of 32 elements: nibbles as above, the fifth bits in a u32 before them. */
function decodeFives(scale: number, zero: number, view: DataView, offset: number, out: Float32Array, at: number): void {
  const high = view.getUint32(offset, true);
  for (let j = 0; j < 16; j++) {
    const byte = view.getUint8(offset + 4 + j);
    out[at + j] = scale * ((byte & 15) | (((high >>> j) & 1) << 4)) + zero;
    out[at + j + 16] = scale * ((byte >> 4) | (((high >>> (j + 16)) & 1) << 4)) + zero;
  }
}

/** The six-bit (scale, minimum) of sub-block 0 … 7 in the 12 packed bytes of the K formats. */
export function kScale(
  view: DataView,
  offset: number,
  subBlock: number,
): { readonly scale: number; readonly minimum: number } {
  if (subBlock < 4) {
    return { scale: view.getUint8(offset + subBlock) & 63, minimum: view.getUint8(offset + subBlock + 4) & 63 };
  }
  const low = view.getUint8(offset + subBlock + 4);
  return {
    scale: (low & 15) | ((view.getUint8(offset + subBlock - 4) >> 6) << 4),
    minimum: (low >> 4) | ((view.getUint8(offset + subBlock) >> 6) << 4),
  };
}

function decodeQ4K(view: DataView, offset: number, out: Float32Array, at: number): void {
  const d = half(view, offset);
  const dmin = half(view, offset + 2);
  for (let sub = 0; sub < 8; sub++) {
    const { scale, minimum } = kScale(view, offset + 4, sub);
    const codes = offset + 16 + (sub >> 1) * 32;
    const shift = (sub & 1) * 4;
    for (let l = 0; l < 32; l++) {
      out[at + sub * 32 + l] = d * scale * ((view.getUint8(codes + l) >> shift) & 15) - dmin * minimum;
    }
  }
}

function decodeQ5K(view: DataView, offset: number, out: Float32Array, at: number): void {
  const d = half(view, offset);
  const dmin = half(view, offset + 2);
  for (let sub = 0; sub < 8; sub++) {
    const { scale, minimum } = kScale(view, offset + 4, sub);
    const codes = offset + 48 + (sub >> 1) * 32;
    const shift = (sub & 1) * 4;
    for (let l = 0; l < 32; l++) {
      const fifth = (view.getUint8(offset + 16 + l) >> sub) & 1;
      const code = ((view.getUint8(codes + l) >> shift) & 15) | (fifth << 4);
      out[at + sub * 32 + l] = d * scale * code - dmin * minimum;
    }
  }
}

/** The six-bit code (0 … 63, offset 32) of element 0 … 255 of a Q6_K block. */
export function q6kCode(view: DataView, offset: number, element: number): number {
  const halfBlock = element >> 7;
  const quarter = (element >> 5) & 3;
  const l = element & 31;
  const low = view.getUint8(offset + halfBlock * 64 + (quarter & 1) * 32 + l);
  const high = view.getUint8(offset + 128 + halfBlock * 32 + l);
  return ((low >> ((quarter >> 1) * 4)) & 15) | (((high >> (quarter * 2)) & 3) << 4);
}

function decodeQ6K(view: DataView, offset: number, out: Float32Array, at: number): void {
  const d = half(view, offset + 208);
  for (let element = 0; element < 256; element++) {
    const scale = d * view.getInt8(offset + 192 + (element >> 4));
    out[at + element] = scale * (q6kCode(view, offset, element) - 32);
  }
}

const DECODERS: Record<GgmlType, BlockDecoder> = {
  F32: (view, offset, out, at) => {
    out[at] = view.getFloat32(offset, true);
  },
  F16: (view, offset, out, at) => {
    out[at] = half(view, offset);
  },
  BF16: (view, offset, out, at) => {
    WORD[0] = view.getUint16(offset, true) << 16;
    out[at] = WORD_AS_FLOAT[0] as number;
  },
  Q4_0: (view, offset, out, at) => {
    const scale = half(view, offset);
    decodeNibbles(scale, -8 * scale, view, offset + 2, out, at);
  },
  Q4_1: (view, offset, out, at) => {
    decodeNibbles(half(view, offset), half(view, offset + 2), view, offset + 4, out, at);
  },
  Q5_0: (view, offset, out, at) => {
    const scale = half(view, offset);
    decodeFives(scale, -16 * scale, view, offset + 2, out, at);
  },
  Q5_1: (view, offset, out, at) => {
    decodeFives(half(view, offset), half(view, offset + 2), view, offset + 4, out, at);
  },
  Q8_0: (view, offset, out, at) => {
    const scale = half(view, offset);
    for (let j = 0; j < 32; j++) out[at + j] = scale * view.getInt8(offset + 2 + j);
  },
  Q4_K: decodeQ4K,
  Q5_K: decodeQ5K,
  Q6_K: decodeQ6K,
};

const WORD = new Uint32Array(1);
const WORD_AS_FLOAT = new Float32Array(WORD.buffer);

/**
 * Decodes `elements` elements to f32 (the arithmetic is f64, rounded once).
 * @throws RangeError unless `elements` is a whole number of blocks and `bytes` holds exactly them.
 */
export function dequantizeGgml(type: GgmlType, bytes: Uint8Array, elements: number): Float32Array<ArrayBuffer> {
  const expected = ggmlByteLength(type, elements);
  if (bytes.byteLength !== expected) {
    throw new RangeError(`${type}: ${bytes.byteLength} bytes for ${elements} elements, expected ${expected}`);
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const out = new Float32Array(elements);
  const block = BLOCKS[type];
  const decode = DECODERS[type];
  for (let at = 0, offset = 0; at < elements; at += block.elements, offset += block.bytes)
    decode(view, offset, out, at);
  return out;
}
