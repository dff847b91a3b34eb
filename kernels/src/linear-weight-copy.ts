/** A second weight with the content of one that is already in GPU memory: gigabytes in milliseconds. */
import { createStorage } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import type { LinearWeight } from "./linear-weight.ts";

/** Copies buffers on the GPU; the two weights live and die apart. */
export function copyLinearWeight(gpu: Gpu, weight: LinearWeight, label: string): LinearWeight {
  const encoder = gpu.device.createCommandEncoder();
  const copy = (source: GPUBuffer, part: string) => {
    const target = createStorage(gpu, `${label} ${part}`, source.size);
    encoder.copyBufferToBuffer(source, 0, target, 0, source.size);
    return target;
  };
  const codes = copy(weight.codes, "codes");
  const scales = copy(weight.scales, "scales");
  gpu.device.queue.submit([encoder.finish()]);
  return {
    ...weight,
    label,
    codes,
    scales,
    destroy() {
      codes.destroy();
      scales.destroy();
    },
  };
}
