/** Repacks rows of ggml blocks into the words of `weight-encoding.ts`. Runs once, at load; no value changes. */
import { type GgmlType, ggmlBlock, kScale, q6kCode } from "./ggml-quants.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import type { WeightEncoding, WeightLayout } from "./weight-encoding.ts";
import { codeWords, codeWordsPerGroup, scaleWords, scaleWordsPerGroup } from "./weight-encoding.ts";

/** Rows repacked together: with layout `columns` they fill one cache line of the output. */
const ROW_TILE = 16;

/** Code and scale words of `rows` rows; in layout `columns` of a slice `rows` wide. */
export interface RepackedRows {
  readonly codes: Uint32Array<ArrayBuffer>;
  readonly scales: Uint32Array<ArrayBuffer>;
}

/** Words of one block, before they are placed. */
interface BlockWords {
  readonly codes: Uint32Array;
  /** Scale words of each group of the block, `scaleWordsPerGroup` apart. */
  readonly scales: Uint32Array;
}

type BlockRepacker = (view: DataView, offset: number, out: BlockWords) => void;

const FLOAT = new Float32Array(2);
const FLOAT_BITS = new Uint32Array(FLOAT.buffer);

function floatBits(value: number): number {
  FLOAT[0] = value;
  return FLOAT_BITS[0] as number;
}

function half(view: DataView, offset: number): number {
  return halfToFloat(view.getUint16(offset, true));
}

function copyWords(view: DataView, offset: number, count: number, out: Uint32Array): void {
  for (let word = 0; word < count; word++) out[word] = view.getUint32(offset + word * 4, true);
}

/** 5-bit codes 0 … 31 less `bias` as signed bytes, from ggml's split nibbles and fifth bits. */
function repackFives(view: DataView, highOffset: number, bias: number, out: Uint32Array): void {
  const high = view.getUint32(highOffset, true);
  for (let word = 0; word < 8; word++) {
    let packed = 0;
    for (let byte = 0; byte < 4; byte++) {
      const element = word * 4 + byte;
      const nibbles = view.getUint8(highOffset + 4 + (element & 15));
      const code = (element < 16 ? nibbles & 15 : nibbles >> 4) | (((high >>> element) & 1) << 4);
      packed |= ((code - bias) & 255) << (byte * 8);
    }
    out[word] = packed;
  }
}

function repackKScales(view: DataView, offset: number, out: BlockWords): void {
  const d = half(view, offset);
  const dmin = half(view, offset + 2);
  for (let sub = 0; sub < 8; sub++) {
    const { scale, minimum } = kScale(view, offset + 4, sub);
    out.scales[sub * 2] = floatBits(d * scale);
    out.scales[sub * 2 + 1] = floatBits(-dmin * minimum);
  }
}

function repackQ4K(view: DataView, offset: number, out: BlockWords): void {
  repackKScales(view, offset, out);
  for (let pair = 0; pair < 4; pair++) {
    for (let word = 0; word < 4; word++) {
      const first = view.getUint32(offset + 16 + pair * 32 + word * 4, true);
      const second = view.getUint32(offset + 32 + pair * 32 + word * 4, true);
      out.codes[pair * 8 + word] = (first & 0x0f0f0f0f) | ((second & 0x0f0f0f0f) << 4);
      out.codes[pair * 8 + 4 + word] = ((first >>> 4) & 0x0f0f0f0f) | (second & 0xf0f0f0f0);
    }
  }
}

function repackQ5K(view: DataView, offset: number, out: BlockWords): void {
  repackKScales(view, offset, out);
  for (let sub = 0; sub < 8; sub++) {
    for (let word = 0; word < 8; word++) {
      const nibbles = (view.getUint32(offset + 48 + (sub >> 1) * 32 + word * 4, true) >>> ((sub & 1) * 4)) & 0x0f0f0f0f;
      const fifths = (view.getUint32(offset + 16 + word * 4, true) >>> sub) & 0x01010101;
      out.codes[sub * 8 + word] = nibbles | (fifths << 4);
    }
  }
}

function repackQ6K(view: DataView, offset: number, out: BlockWords): void {
  const d = half(view, offset + 208);
  for (let group = 0; group < 16; group++) out.scales[group] = floatBits(d * view.getInt8(offset + 192 + group));
  for (let word = 0; word < 64; word++) {
    let packed = 0;
    for (let byte = 0; byte < 4; byte++) {
      packed |= ((q6kCode(view, offset, word * 4 + byte) - 32) & 255) << (byte * 8);
    }
    out.codes[word] = packed;
  }
}

const REPACKERS: Record<Exclude<GgmlType, "F32" | "F16" | "BF16">, BlockRepacker> = {
  Q4_0: (view, offset, out) => {
    const scale = view.getUint16(offset, true);
    out.scales[0] = scale | (floatToHalf(-8 * halfToFloat(scale)) << 16);
    copyWords(view, offset + 2, 4, out.codes);
  },
  Q4_1: (view, offset, out) => {
    out.scales[0] = view.getUint32(offset, true);
    copyWords(view, offset + 4, 4, out.codes);
  },
  Q5_0: (view, offset, out) => {
    out.scales[0] = floatBits(half(view, offset));
    repackFives(view, offset + 2, 16, out.codes);
  },
  Q5_1: (view, offset, out) => {
    out.scales[0] = floatBits(half(view, offset));
    out.scales[1] = floatBits(half(view, offset + 2));
    repackFives(view, offset + 4, 0, out.codes);
  },
  Q8_0: (view, offset, out) => {
    out.scales[0] = floatBits(half(view, offset));
    copyWords(view, offset + 2, 8, out.codes);
  },
  Q4_K: repackQ4K,
  Q5_K: repackQ5K,
  Q6_K: repackQ6K,
};

interface Placement {
  readonly stride: number;
  readonly rowStep: number;
}

/** Word w of row r goes to `r * rowStep + w * stride`. */
function placement(layout: WeightLayout, rows: number, wordsPerRow: number): Placement {
  return layout === "columns" ? { stride: rows, rowStep: 1 } : { stride: 1, rowStep: wordsPerRow };
}

function repackFloats(data: Uint8Array, rows: number, wordsPerRow: number, layout: WeightLayout): RepackedRows {
  // Layout `rows` is how floats lie in the file: nothing moves, and aligned bytes are not even copied.
  if (layout === "rows") {
    const aligned = data.byteOffset % 4 === 0 ? data : data.slice();
    const words = new Uint32Array(aligned.buffer as ArrayBuffer, aligned.byteOffset, rows * wordsPerRow);
    return { codes: words, scales: new Uint32Array(0) };
  }
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const codes = new Uint32Array(rows * wordsPerRow);
  const { stride, rowStep } = placement(layout, rows, wordsPerRow);
  for (let tile = 0; tile < rows; tile += ROW_TILE) {
    const end = Math.min(rows, tile + ROW_TILE);
    for (let word = 0; word < wordsPerRow; word++) {
      for (let row = tile; row < end; row++) {
        codes[row * rowStep + word * stride] = view.getUint32((row * wordsPerRow + word) * 4, true);
      }
    }
  }
  return { codes, scales: new Uint32Array(0) };
}

/**
 * Repacks `rows` × `columns` of `data` into the encoding of `type`; the caller has checked columns and byte length.
 */
export function repackRows(
  type: GgmlType,
  data: Uint8Array,
  rows: number,
  columns: number,
  encoding: WeightEncoding,
  layout: WeightLayout,
): RepackedRows {
  const rowCodes = codeWords(encoding, columns);
  if (type === "F32" || type === "F16" || type === "BF16") return repackFloats(data, rows, rowCodes, layout);
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const rowScales = scaleWords(encoding, columns);
  const codes = new Uint32Array(rows * rowCodes);
  const scales = new Uint32Array(rows * rowScales);
  const toCodes = placement(layout, rows, rowCodes);
  const toScales = placement(layout, rows, rowScales);
  const block = ggmlBlock(type);
  const groups = block.elements / encoding.group;
  const blockCodes = groups * codeWordsPerGroup(encoding);
  const blockScales = groups * scaleWordsPerGroup(encoding);
  const blocks = columns / block.elements;
  const words: BlockWords = { codes: new Uint32Array(blockCodes), scales: new Uint32Array(Math.max(2, blockScales)) };
  const repack = REPACKERS[type];
  for (let tile = 0; tile < rows; tile += ROW_TILE) {
    const end = Math.min(rows, tile + ROW_TILE);
    for (let index = 0; index < blocks; index++) {
      for (let row = tile; row < end; row++) {
        repack(view, (row * blocks + index) * block.bytes, words);
        const codeAt = row * toCodes.rowStep + index * blockCodes * toCodes.stride;
        for (let word = 0; word < blockCodes; word++)
          codes[codeAt + word * toCodes.stride] = words.codes[word] as number;
        const scaleAt = row * toScales.rowStep + index * blockScales * toScales.stride;
        for (let word = 0; word < blockScales; word++)
          scales[scaleAt + word * toScales.stride] = words.scales[word] as number;
      }
    }
  }
  return { codes, scales };
}
