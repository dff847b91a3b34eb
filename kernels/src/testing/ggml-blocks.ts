/** Random ggml blocks: every code bit pattern occurs, scales are drawn around a sane size. */
import { type GgmlType, ggmlBlock, ggmlByteLength } from "../ggml-quants.ts";
import { floatToHalf } from "../half.ts";
import type { Random } from "./random.ts";

/** Byte offsets of the f16 fields of a block; the rest is random bits. */
const HALF_FIELDS: Record<GgmlType, readonly number[]> = {
  F32: [],
  F16: [0],
  BF16: [],
  Q4_0: [0],
  Q4_1: [0, 2],
  Q5_0: [0],
  Q5_1: [0, 2],
  Q8_0: [0],
  Q4_K: [0, 2],
  Q5_K: [0, 2],
  Q6_K: [208],
};

/** Deviation of the f16 fields that makes weights of about 0.05. */
const HALF_SIZE: Record<GgmlType, number> = {
  F32: 0.05,
  F16: 0.05,
  BF16: 0.05,
  Q4_0: 0.01,
  Q4_1: 0.01,
  Q5_0: 0.005,
  Q5_1: 0.005,
  Q8_0: 0.0007,
  Q4_K: 0.0002,
  Q5_K: 0.0001,
  Q6_K: 0.00003,
};

/** Blocks of `elements` elements. */
export function randomGgml(random: Random, type: GgmlType, elements: number): Uint8Array<ArrayBuffer> {
  const bytes = random.bytes(ggmlByteLength(type, elements));
  const view = new DataView(bytes.buffer);
  const { bytes: blockBytes } = ggmlBlock(type);
  for (let offset = 0; offset < bytes.length; offset += blockBytes) {
    if (type === "F32") view.setFloat32(offset, random.normal(0, HALF_SIZE.F32), true);
    if (type === "BF16") {
      const scratch = new DataView(new ArrayBuffer(4));
      scratch.setFloat32(0, random.normal(0, HALF_SIZE.BF16), true);
      view.setUint16(offset, scratch.getUint16(2, true), true);
    }
    for (const field of HALF_FIELDS[type]) {
      view.setUint16(offset + field, floatToHalf(random.normal(0, HALF_SIZE[type])), true);
    }
  }
  return bytes;
}
