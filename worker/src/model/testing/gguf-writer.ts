/** Writes small GGUF files (version 3), so that tests can make right and wrong ones. */
import { GGMLQuantizationType, GGUFValueType } from "@huggingface/gguf";
import type { ModelTensor } from "../loaded-model.ts";

export type GgufValue = string | number | boolean | readonly string[] | readonly number[];

export interface GgufTensorData {
  readonly name: string;
  /** Number of the type in the file. */
  readonly type: number;
  readonly rows: number;
  readonly columns: number;
  readonly data: Uint8Array;
}

const ALIGNMENT = 32;

class ByteWriter {
  readonly #parts: Uint8Array[] = [];
  length = 0;

  bytes(part: Uint8Array): void {
    this.#parts.push(part);
    this.length += part.byteLength;
  }

  #view(bytes: number, fill: (view: DataView) => void): void {
    const view = new DataView(new ArrayBuffer(bytes));
    fill(view);
    this.bytes(new Uint8Array(view.buffer));
  }

  u32(value: number): void {
    this.#view(4, (view) => view.setUint32(0, value, true));
  }

  u64(value: number): void {
    this.#view(8, (view) => view.setBigUint64(0, BigInt(value), true));
  }

  f32(value: number): void {
    this.#view(4, (view) => view.setFloat32(0, value, true));
  }

  text(value: string): void {
    const bytes = new TextEncoder().encode(value);
    this.u64(bytes.length);
    this.bytes(bytes);
  }

  pad(): void {
    this.bytes(new Uint8Array((ALIGNMENT - (this.length % ALIGNMENT)) % ALIGNMENT));
  }

  join(): Uint8Array {
    return Buffer.concat(this.#parts);
  }
}

function writeScalar(out: ByteWriter, value: string | number | boolean): void {
  if (typeof value === "string") out.text(value);
  else if (typeof value === "boolean") out.bytes(Uint8Array.of(value ? 1 : 0));
  else if (Number.isInteger(value)) out.u32(value >>> 0);
  else out.f32(value);
}

function valueType(value: string | number | boolean): GGUFValueType {
  if (typeof value === "string") return GGUFValueType.STRING;
  if (typeof value === "boolean") return GGUFValueType.BOOL;
  return Number.isInteger(value) ? GGUFValueType.UINT32 : GGUFValueType.FLOAT32;
}

function writeValue(out: ByteWriter, value: GgufValue): void {
  if (typeof value === "string" || typeof value === "number" || typeof value === "boolean") {
    out.u32(valueType(value));
    writeScalar(out, value);
    return;
  }
  out.u32(GGUFValueType.ARRAY);
  out.u32(valueType(value[0] ?? 0));
  out.u64(value.length);
  for (const item of value) writeScalar(out, item);
}

/** Tensors of a loaded model in the file's terms. */
export function ggufTensors(tensors: Iterable<ModelTensor>): GgufTensorData[] {
  return [...tensors].map(({ name, type, rows, columns, read }) => ({
    name,
    type: GGMLQuantizationType[type],
    rows,
    columns,
    data: read(),
  }));
}

/** Bytes of the whole file. */
export function ggufBytes(
  metadata: Readonly<Record<string, GgufValue>>,
  tensors: readonly GgufTensorData[],
): Uint8Array {
  const out = new ByteWriter();
  out.bytes(new TextEncoder().encode("GGUF"));
  out.u32(3);
  out.u64(tensors.length);
  out.u64(Object.keys(metadata).length);
  for (const [key, value] of Object.entries(metadata)) {
    out.text(key);
    writeValue(out, value);
  }
  let offset = 0;
  for (const { name, type, rows, columns, data } of tensors) {
    out.text(name);
    const shape = rows === 1 ? [columns] : [columns, rows];
    out.u32(shape.length);
    for (const extent of shape) out.u64(extent);
    out.u32(type);
    out.u64(offset);
    offset += Math.ceil(data.byteLength / ALIGNMENT) * ALIGNMENT;
  }
  out.pad();
  for (const { data } of tensors) {
    out.bytes(data);
    out.pad();
  }
  return out.join();
}
