/** Sealed blocks between the GPU's pages and the host, byte for byte. */
import type { Gpu } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { KvCache } from "./kv-cache.ts";
import type { MemoryAccount } from "./memory-account.ts";

export class BlockTransfer {
  readonly #gpu: Gpu;
  readonly #cache: KvCache;
  readonly #numPages: number;
  readonly #staging: GPUBuffer;
  // One staging buffer: reads wait for each other.
  #lastRead: Promise<unknown> = Promise.resolve();

  constructor(gpu: Gpu, memory: MemoryAccount, cache: KvCache, numPages: number) {
    this.#gpu = gpu;
    this.#cache = cache;
    this.#numPages = numPages;
    this.#staging = memory.staging("other", "block read", this.blockBytes);
  }

  get blockBytes(): number {
    return this.#cache.pageBytes * this.#cache.pages.length;
  }

  #checkPage(page: number): void {
    if (Number.isInteger(page) && page >= 0 && page < this.#numPages) return;
    throw new ClusterError("INVALID_ARGUMENT", `page ${page} is not in 0..${this.#numPages - 1}`);
  }

  async read(page: number): Promise<Uint8Array> {
    this.#checkPage(page);
    const read = this.#lastRead.then(() => this.#readNow(page));
    // The next read goes on whether this one fails or not; its own caller gets the error.
    this.#lastRead = read.then(
      () => undefined,
      () => undefined,
    );
    return read;
  }

  async #readNow(page: number): Promise<Uint8Array> {
    const { pageBytes, pages } = this.#cache;
    const encoder = this.#gpu.device.createCommandEncoder();
    pages.forEach((layer, index) => {
      encoder.copyBufferToBuffer(layer, page * pageBytes, this.#staging, index * pageBytes, pageBytes);
    });
    this.#gpu.device.queue.submit([encoder.finish()]);
    await this.#staging.mapAsync(GPUMapMode.READ);
    const payload = new Uint8Array(this.#staging.getMappedRange().slice(0));
    this.#staging.unmap();
    return payload;
  }

  write(page: number, payload: Uint8Array): void {
    this.#checkPage(page);
    if (payload.byteLength !== this.blockBytes) {
      throw new ClusterError("INVALID_ARGUMENT", `a block has ${this.blockBytes} bytes, not ${payload.byteLength}`);
    }
    const { pageBytes, pages } = this.#cache;
    const bytes = payload as Uint8Array<ArrayBuffer>;
    pages.forEach((layer, index) => {
      this.#gpu.device.queue.writeBuffer(layer, page * pageBytes, bytes, index * pageBytes, pageBytes);
    });
  }
}
