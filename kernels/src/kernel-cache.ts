/** Compiles each distinct kernel once per device: layers of equal shape share one pipeline. */
import type { Gpu } from "./device.ts";
import { createKernel, type Kernel, type KernelDescriptor } from "./kernel.ts";

const caches = new WeakMap<Gpu, Map<string, Promise<Kernel>>>();

/** Like `createKernel`, but returns the kernel made before for the same text, bindings and constants on this device. */
export function cachedKernel(gpu: Gpu, descriptor: KernelDescriptor): Promise<Kernel> {
  let cache = caches.get(gpu);
  if (cache === undefined) {
    cache = new Map();
    caches.set(gpu, cache);
  }
  const { code, bindings, immediateBytes = 0, constants = {}, entryPoint = "main" } = descriptor;
  const key = JSON.stringify([code, bindings, immediateBytes, constants, entryPoint]);
  let kernel = cache.get(key);
  if (kernel === undefined) {
    kernel = createKernel(gpu, descriptor);
    cache.set(key, kernel);
  }
  return kernel;
}
