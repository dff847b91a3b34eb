/**
 * A safetensors file: 8 bytes of header length (u64 LE), a JSON header, then the tensors' bytes.
 * Format: https://github.com/huggingface/safetensors
 */
import { closeSync, fstatSync, openSync, readSync } from "node:fs";
import { type GgmlType, ggmlByteLength } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import { z } from "zod";
import { readRange } from "./file-range.ts";
import type { ModelTensor } from "./loaded-model.ts";

/** The format's own limit. */
const MAX_HEADER_BYTES = 100 << 20;

const TYPES: ReadonlyMap<string, GgmlType> = new Map<string, GgmlType>([
  ["F32", "F32"],
  ["F16", "F16"],
  ["BF16", "BF16"],
]);

const entrySchema = z.object({
  dtype: z.string(),
  shape: z.array(z.int().nonnegative()),
  data_offsets: z.tuple([z.int().nonnegative(), z.int().nonnegative()]),
});
const headerSchema = z.record(z.string(), z.unknown());

export interface SafetensorsFile {
  /** Under the names that the file uses. */
  readonly tensors: ReadonlyMap<string, ModelTensor>;
  readonly fileBytes: number;
  close(): void;
}

function invalid(path: string, message: string, cause?: unknown): ClusterError {
  return new ClusterError("MODEL_FILE_INVALID", `${path}: ${message}`, { cause });
}

/** @throws ClusterError MODEL_FILE_INVALID or MODEL_UNSUPPORTED, naming the tensor. */
export function openSafetensors(path: string): SafetensorsFile {
  const descriptor = openSync(path, "r");
  try {
    const fileBytes = fstatSync(descriptor).size;
    const { header, dataOffset } = readHeader(path, descriptor, fileBytes);
    const tensors = new Map<string, ModelTensor>();
    for (const [name, entry] of Object.entries(header)) {
      if (name !== "__metadata__") {
        tensors.set(name, describeTensor(path, descriptor, name, entry, dataOffset, fileBytes));
      }
    }
    return { tensors, fileBytes, close: () => closeSync(descriptor) };
  } catch (error) {
    closeSync(descriptor);
    throw error;
  }
}

function readHeader(path: string, descriptor: number, fileBytes: number) {
  const prefix = new DataView(new ArrayBuffer(8));
  if (readSync(descriptor, prefix, 0, 8, 0) < 8) throw invalid(path, `${fileBytes} bytes are no safetensors file`);
  const length = Number(prefix.getBigUint64(0, true));
  if (length > MAX_HEADER_BYTES || 8 + length > fileBytes) {
    throw invalid(
      path,
      `the header of ${length} bytes does not fit the file of ${fileBytes}: truncated or not safetensors`,
    );
  }
  const bytes = readRange(path, descriptor, "header", 8, length);
  try {
    return { header: headerSchema.parse(JSON.parse(new TextDecoder().decode(bytes))), dataOffset: 8 + length };
  } catch (error) {
    throw invalid(path, "the header is not a JSON object", error);
  }
}

function describeTensor(
  path: string,
  descriptor: number,
  name: string,
  raw: unknown,
  dataOffset: number,
  fileBytes: number,
): ModelTensor {
  const parsed = entrySchema.safeParse(raw);
  if (!parsed.success) throw invalid(path, `tensor "${name}" has a malformed header entry`, parsed.error);
  const { dtype, shape, data_offsets: range } = parsed.data;
  const type = TYPES.get(dtype);
  if (type === undefined) {
    throw new ClusterError(
      "MODEL_UNSUPPORTED",
      `${path}: tensor "${name}" has type ${dtype}; supported are ${[...TYPES.keys()].join(", ")}`,
    );
  }
  const columns = shape[shape.length - 1] ?? 1;
  const rows = shape.slice(0, -1).reduce((product, extent) => product * extent, 1);
  const bytes = ggmlByteLength(type, rows * columns);
  if (range[1] - range[0] !== bytes) {
    throw invalid(
      path,
      `tensor "${name}" [${shape.join(", ")}] of ${dtype} needs ${bytes} bytes, not ${range[1] - range[0]}`,
    );
  }
  const start = dataOffset + range[0];
  if (start + bytes > fileBytes) {
    throw invalid(
      path,
      `truncated: tensor "${name}" ends at byte ${start + bytes}, the file at ${fileBytes}; fetch it again`,
    );
  }
  return { name, type, rows, columns, bytes, read: () => readRange(path, descriptor, name, start, bytes) };
}
