/** A GGUF file: its metadata, and its tensors with byte ranges checked against the file's size. */
import { closeSync, fstatSync, openSync } from "node:fs";
import { GGMLQuantizationType, gguf } from "@huggingface/gguf";
import { GGML_TYPES, type GgmlType, ggmlBlock, ggmlByteLength } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import { readRange } from "./file-range.ts";
import type { ModelTensor } from "./loaded-model.ts";

/** Metadata values as the parser gives them: numbers, bigints, strings, booleans and arrays of these. */
export type GgufMetadata = Readonly<Record<string, unknown>>;

export interface GgufFile {
  readonly metadata: GgufMetadata;
  readonly tensors: ReadonlyMap<string, ModelTensor>;
  readonly fileBytes: number;
  close(): void;
}

interface TensorInfo {
  readonly name: string;
  readonly shape: readonly bigint[];
  readonly dtype: number;
  readonly offset: bigint;
}

function isGgmlType(name: string | undefined): name is GgmlType {
  return (GGML_TYPES as readonly (string | undefined)[]).includes(name);
}

/**
 * Parses the header of a local file.
 * @throws ClusterError MODEL_FILE_INVALID for a broken or truncated file, MODEL_UNSUPPORTED for a tensor type that
 *   cannot be read; both name the tensor.
 */
export async function openGguf(path: string): Promise<GgufFile> {
  const header = await parseHeader(path);
  const descriptor = openSync(path, "r");
  try {
    const fileBytes = fstatSync(descriptor).size;
    const dataOffset = Number(header.tensorDataOffset);
    if (dataOffset > fileBytes) throw truncated(path, fileBytes, `the header alone ends at byte ${dataOffset}`);
    const tensors = new Map<string, ModelTensor>();
    for (const info of header.tensorInfos) {
      tensors.set(info.name, describeTensor(path, descriptor, info, dataOffset, fileBytes));
    }
    return { metadata: { ...header.metadata }, tensors, fileBytes, close: () => closeSync(descriptor) };
  } catch (error) {
    closeSync(descriptor);
    throw error;
  }
}

async function parseHeader(path: string) {
  try {
    const header = await gguf(path, { allowLocalFile: true });
    if (!header.littleEndian) throw new RangeError("it is big-endian");
    return header;
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new ClusterError("MODEL_FILE_INVALID", `${path}: the GGUF header cannot be read: ${reason}`, {
      cause: error,
    });
  }
}

function truncated(path: string, fileBytes: number, what: string): ClusterError {
  return new ClusterError(
    "MODEL_FILE_INVALID",
    `${path}: the file is truncated: it has ${fileBytes} bytes, but ${what}; fetch it again`,
  );
}

function describeTensor(
  path: string,
  descriptor: number,
  info: TensorInfo,
  dataOffset: number,
  fileBytes: number,
): ModelTensor {
  const { name } = info;
  const type = GGMLQuantizationType[info.dtype];
  if (!isGgmlType(type)) {
    const shown = type ?? `number ${info.dtype}`;
    throw new ClusterError(
      "MODEL_UNSUPPORTED",
      `${path}: tensor "${name}" has type ${shown}; supported are ${GGML_TYPES.join(", ")}`,
    );
  }
  const [columns = 1, rows = 1, ...more] = info.shape.map(Number);
  if (more.some((extent) => extent !== 1)) {
    throw new ClusterError(
      "MODEL_UNSUPPORTED",
      `${path}: tensor "${name}" has ${info.shape.length} dimensions, at most 2`,
    );
  }
  const block = ggmlBlock(type).elements;
  if (columns % block !== 0) {
    throw new ClusterError(
      "MODEL_FILE_INVALID",
      `${path}: tensor "${name}" has rows of ${columns} elements, which ${type} blocks of ${block} do not divide`,
    );
  }
  const bytes = ggmlByteLength(type, rows * columns);
  const start = dataOffset + Number(info.offset);
  if (start + bytes > fileBytes) {
    throw truncated(path, fileBytes, `tensor "${name}" lies at bytes ${start} to ${start + bytes}`);
  }
  return { name, type, rows, columns, bytes, read: () => readRange(path, descriptor, name, start, bytes) };
}
