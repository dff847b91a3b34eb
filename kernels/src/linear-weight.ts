/** Weights of one linear layer in GPU memory: codes and scales, repacked from ggml blocks, parts stacked along N. */
import { createStorage } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import { type GgmlType, ggmlByteLength } from "./ggml-quants.ts";
import {
  codeWords,
  scaleWords,
  validateColumns,
  type WeightEncoding,
  type WeightFormat,
  type WeightLayout,
  weightEncoding,
} from "./weight-encoding.ts";
import { type RepackedRows, repackRows } from "./weight-repack.ts";

export interface LinearWeightPart {
  readonly type: GgmlType;
  /** Outputs of this part. */
  readonly rows: number;
  /** Rows of ggml blocks, row after row; `ggmlByteLength(type, rows * columns)` bytes. */
  readonly data: Uint8Array;
}

export interface LinearWeightDescriptor {
  readonly label: string;
  /** Stacked along N in this order. */
  readonly parts: readonly LinearWeightPart[];
  /** K: inputs of every output. */
  readonly columns: number;
}

export interface LinearWeight {
  readonly label: string;
  /** N: outputs. */
  readonly rows: number;
  /** K: inputs. */
  readonly columns: number;
  readonly format: WeightFormat;
  readonly encoding: WeightEncoding;
  readonly layout: WeightLayout;
  /** Bytes of GPU memory. */
  readonly bytes: number;
  readonly codes: GPUBuffer;
  /** One unused word where the encoding has no scales. */
  readonly scales: GPUBuffer;
  destroy(): void;
}

/** The parts need different encodings: make one weight for each instead. */
export class LinearWeightMixError extends Error {
  override readonly name = "LinearWeightMixError";
}

/** The weight is larger than what one binding of this device holds. */
export class LinearWeightSizeError extends Error {
  override readonly name = "LinearWeightSizeError";
}

function commonEncoding(label: string, parts: readonly LinearWeightPart[]): WeightEncoding {
  const first = parts[0];
  if (first === undefined) throw new RangeError(`${label}: no parts`);
  const encoding = weightEncoding(first.type);
  for (const part of parts) {
    const other = weightEncoding(part.type);
    if (other.format !== encoding.format || other.scales !== encoding.scales || other.group !== encoding.group) {
      throw new LinearWeightMixError(
        `${label}: ${first.type} is stored as ${encoding.format}/${encoding.scales}/${encoding.group} and ${part.type} as ` +
          `${other.format}/${other.scales}/${other.group}: they cannot be stacked`,
      );
    }
  }
  return encoding;
}

function validatePart(label: string, part: LinearWeightPart, columns: number): void {
  validateColumns(label, part.type, columns);
  if (!Number.isInteger(part.rows) || part.rows <= 0)
    throw new RangeError(`${label}: ${part.rows} rows, must be positive`);
  const expected = ggmlByteLength(part.type, part.rows * columns);
  if (part.data.byteLength !== expected) {
    throw new RangeError(
      `${label}: ${part.data.byteLength} bytes of ${part.type} for ${part.rows} × ${columns}, expected ${expected}`,
    );
  }
}

function checkSize(gpu: Gpu, label: string, words: number): void {
  const limit = Math.min(gpu.device.limits.maxStorageBufferBindingSize, gpu.device.limits.maxBufferSize);
  if (words * 4 > limit) {
    throw new LinearWeightSizeError(`${label}: ${words * 4} bytes, this device binds at most ${limit}`);
  }
}

/** Writes the part's words at its place among `rows` outputs, of which it starts at `firstRow`. */
function upload(
  gpu: Gpu,
  buffer: GPUBuffer,
  words: Uint32Array<ArrayBuffer>,
  firstRow: number,
  rowWords: number,
): void {
  if (words.length > 0) gpu.device.queue.writeBuffer(buffer, firstRow * rowWords * 4, words);
}

/** In layout `columns` the parts interleave word by word, so they are joined on the host first. */
function joinColumns(
  parts: readonly Uint32Array<ArrayBuffer>[],
  widths: readonly number[],
  wordsPerRow: number,
): Uint32Array<ArrayBuffer> {
  const rows = widths.reduce((sum, width) => sum + width, 0);
  const joined = new Uint32Array(rows * wordsPerRow);
  let first = 0;
  for (const [index, part] of parts.entries()) {
    const width = widths[index] as number;
    for (let word = 0; word < wordsPerRow; word++) {
      joined.set(part.subarray(word * width, (word + 1) * width), word * rows + first);
    }
    first += width;
  }
  return joined;
}

/**
 * Repacks and uploads one weight matrix [N][K].
 * @throws LinearWeightMixError where the parts map to different encodings.
 * @throws LinearWeightSizeError where one binding cannot hold it.
 * @throws RangeError for wrong shapes or byte lengths.
 */
export function createLinearWeight(gpu: Gpu, descriptor: LinearWeightDescriptor): LinearWeight {
  const { label, parts, columns } = descriptor;
  for (const part of parts) validatePart(label, part, columns);
  const encoding = commonEncoding(label, parts);
  const layout: WeightLayout = gpu.profile === "software" ? "columns" : "rows";
  const widths = parts.map((part) => part.rows);
  const rows = widths.reduce((sum, width) => sum + width, 0);
  const rowCodes = codeWords(encoding, columns);
  const rowScales = scaleWords(encoding, columns);
  checkSize(gpu, `${label} codes`, rows * rowCodes);
  checkSize(gpu, `${label} scales`, rows * rowScales);
  const codes = createStorage(gpu, `${label} codes`, rows * rowCodes * 4);
  const scales = createStorage(gpu, `${label} scales`, Math.max(1, rows * rowScales) * 4);
  const repacked: RepackedRows[] = parts.map((part) =>
    repackRows(part.type, part.data, part.rows, columns, encoding, layout),
  );
  if (layout === "columns" && repacked.length > 1) {
    upload(
      gpu,
      codes,
      joinColumns(
        repacked.map((part) => part.codes),
        widths,
        rowCodes,
      ),
      0,
      rowCodes,
    );
    upload(
      gpu,
      scales,
      joinColumns(
        repacked.map((part) => part.scales),
        widths,
        rowScales,
      ),
      0,
      rowScales,
    );
  } else {
    let first = 0;
    for (const [index, part] of repacked.entries()) {
      upload(gpu, codes, part.codes, first, rowCodes);
      upload(gpu, scales, part.scales, first, rowScales);
      first += widths[index] as number;
    }
  }
  return {
    label,
    rows,
    columns,
    format: encoding.format,
    encoding,
    layout,
    bytes: codes.size + scales.size,
    codes,
    scales,
    destroy() {
      codes.destroy();
      scales.destroy();
    },
  };
}
