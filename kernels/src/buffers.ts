/** Buffer creation and readback. Every buffer is storage + copy source + copy destination unless said otherwise. */
import type { Gpu } from "./device.ts";

/** Storage buffer of `bytes`, rounded up to 4. Contents are undefined until written. */
export function createStorage(gpu: Gpu, label: string, bytes: number): GPUBuffer {
  return gpu.device.createBuffer({
    label,
    size: Math.max(4, Math.ceil(bytes / 4) * 4),
    usage: GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST,
  });
}

/** Storage buffer holding `data`; its byte length is padded to 4. */
export function uploadStorage(gpu: Gpu, label: string, data: ArrayBufferView): GPUBuffer {
  const buffer = createStorage(gpu, label, data.byteLength);
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  if (bytes.byteLength % 4 === 0) {
    gpu.device.queue.writeBuffer(buffer, 0, bytes as Uint8Array<ArrayBuffer>);
  } else {
    const padded = new Uint8Array(Math.ceil(bytes.byteLength / 4) * 4);
    padded.set(bytes);
    gpu.device.queue.writeBuffer(buffer, 0, padded);
  }
  return buffer;
}

/** Copies `size` bytes at `offset` back to the host. For tests and rare reads: makes a staging buffer each time. */
export async function readBuffer(
  gpu: Gpu,
  buffer: GPUBuffer,
  offset = 0,
  size = buffer.size - offset,
): Promise<ArrayBuffer> {
  const staging = gpu.device.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
  const encoder = gpu.device.createCommandEncoder();
  encoder.copyBufferToBuffer(buffer, offset, staging, 0, size);
  gpu.device.queue.submit([encoder.finish()]);
  await staging.mapAsync(GPUMapMode.READ);
  const copy = staging.getMappedRange().slice(0);
  staging.destroy();
  return copy;
}

/** Encodes into one compute pass and submits it. */
export function submitPass(gpu: Gpu, encode: (pass: GPUComputePassEncoder) => void): void {
  const encoder = gpu.device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  encode(pass);
  pass.end();
  gpu.device.queue.submit([encoder.finish()]);
}
