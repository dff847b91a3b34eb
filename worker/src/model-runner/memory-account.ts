/** Counts GPU bytes by use and remembers what to destroy. */
import { createStorage, type Gpu } from "@kivimesh/kernels";
import type { RunnerMemory } from "./model-runner.ts";

export type MemoryUse = keyof RunnerMemory;

interface Destroyable {
  destroy(): void;
}

export class MemoryAccount {
  readonly #gpu: Gpu;
  readonly #bytes = { weights: 0, kv: 0, activations: 0, other: 0 };
  readonly #owned: Destroyable[] = [];

  constructor(gpu: Gpu) {
    this.#gpu = gpu;
  }

  /** Storage buffer of `bytes`. @throws RangeError where one binding of the device cannot hold it. */
  storage(use: MemoryUse, label: string, bytes: number): GPUBuffer {
    const limit = this.#gpu.device.limits.maxStorageBufferBindingSize;
    if (bytes > limit) throw new RangeError(`${label}: ${bytes} bytes, this device binds at most ${limit}`);
    return this.add(use, createStorage(this.#gpu, label, bytes));
  }

  /** Buffer that the host maps to read results. */
  staging(use: MemoryUse, label: string, bytes: number): GPUBuffer {
    const usage = GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST;
    return this.add(use, this.#gpu.device.createBuffer({ label, size: Math.ceil(bytes / 4) * 4, usage }));
  }

  add(use: MemoryUse, buffer: GPUBuffer): GPUBuffer {
    this.own(use, buffer.size, buffer);
    return buffer;
  }

  /** Counts `bytes` that `owner` holds on the GPU; it is destroyed with the rest. */
  own(use: MemoryUse, bytes: number, owner: Destroyable): void {
    this.#bytes[use] += bytes;
    this.#owned.push(owner);
  }

  /** Destroys a buffer that was added. */
  release(use: MemoryUse, buffer: GPUBuffer): void {
    this.#bytes[use] -= buffer.size;
    this.#owned.splice(this.#owned.indexOf(buffer), 1);
    buffer.destroy();
  }

  total(): RunnerMemory {
    return { ...this.#bytes };
  }

  destroy(): void {
    for (const owner of this.#owned.splice(0)) owner.destroy();
  }
}
