/** Timing of encoded work by GPU timestamps; the host sleeps meanwhile, because Dawn's polling would take a core. */
import { setTimeout as sleep } from "node:timers/promises";
import { createStorage, type Gpu, readBuffer } from "../src/index.ts";

/** Microseconds of one run of `encode` in a pass of its own: the best and the median of `repeats` after one warm-up. */
export async function timePass(
  gpu: Gpu,
  encode: (pass: GPUComputePassEncoder) => void,
  repeats: number,
): Promise<{ readonly best: number; readonly median: number }> {
  const { device } = gpu;
  if (!gpu.features.timestampQuery) throw new Error("this device has no timestamp queries");
  const count = 2 * (repeats + 1);
  const querySet = device.createQuerySet({ type: "timestamp", count });
  const resolved = device.createBuffer({
    size: count * 8,
    usage: GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC,
  });
  const copy = createStorage(gpu, "timestamps", count * 8);
  const encoder = device.createCommandEncoder();
  for (let run = 0; run <= repeats; run++) {
    const pass = encoder.beginComputePass({
      timestampWrites: { querySet, beginningOfPassWriteIndex: run * 2, endOfPassWriteIndex: run * 2 + 1 },
    });
    encode(pass);
    pass.end();
  }
  encoder.resolveQuerySet(querySet, 0, count, resolved, 0);
  encoder.copyBufferToBuffer(resolved, 0, copy, 0, count * 8);
  const start = performance.now();
  device.queue.submit([encoder.finish()]);
  // One sleep of a rough guess; the precise end does not matter, since the device's own clock is read.
  await sleep(lastDuration);
  const stamps = new BigUint64Array(await readBuffer(gpu, copy));
  lastDuration = Math.max(5, (performance.now() - start) * 0.8);
  const times = Array.from({ length: repeats }, (_, run) => {
    const index = (run + 1) * 2;
    return Number((stamps[index + 1] as bigint) - (stamps[index] as bigint)) / 1000;
  }).sort((a, b) => a - b);
  querySet.destroy();
  resolved.destroy();
  copy.destroy();
  return { best: times[0] as number, median: times[times.length >> 1] as number };
}

let lastDuration = 50;
