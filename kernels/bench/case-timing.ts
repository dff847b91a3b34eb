/** Times a prepared case by GPU timestamps, with the clocks up: a chip that idles for milliseconds runs at a fifth of its speed. */
import { createStorage, type Gpu, readBuffer, submitPass } from "../src/index.ts";
import type { PreparedCase } from "./kernel-case.ts";

export interface TimingPlan {
  /** Seconds of the same work right before the samples. */
  readonly warmSeconds: number;
  readonly samples: number;
  /** Runs in a sample, at least. Short kernels take more, so that a sample lasts `sampleMilliseconds`. */
  readonly minimumRuns: number;
  readonly sampleMilliseconds: number;
}

/** What is reported of a GPU. */
export const HARDWARE_TIMING: TimingPlan = { warmSeconds: 0.3, samples: 7, minimumRuns: 20, sampleMilliseconds: 3 };

/** A software driver has no clocks to raise, and takes seconds where a GPU takes milliseconds. */
export const SOFTWARE_TIMING: TimingPlan = { warmSeconds: 0, samples: 3, minimumRuns: 1, sampleMilliseconds: 0 };

/** Milliseconds of one run. */
export interface CaseTime {
  readonly median: number;
  readonly least: number;
  readonly most: number;
  /** Runs in each sample. */
  readonly runs: number;
}

const MAX_RUNS = 1000;
/** Runs of long kernels are fewer than the plan's minimum: no sample needs to be longer than this. */
const LONGEST_SAMPLE_MILLISECONDS = 250;
/** Length of one warming command buffer: short enough that a driver's watchdog never sees it. */
const WARM_CHUNK_MILLISECONDS = 40;

/** Writes the time at which each pass ended; differences leave out whatever the front end does ahead of time. */
class EndStamps {
  readonly #gpu: Gpu;
  readonly #querySet: GPUQuerySet;
  readonly #resolved: GPUBuffer;
  readonly #copy: GPUBuffer;
  readonly #count: number;

  constructor(gpu: Gpu, count: number) {
    if (!gpu.features.timestampQuery) throw new Error("this device has no timestamp queries");
    this.#gpu = gpu;
    this.#count = count;
    this.#querySet = gpu.device.createQuerySet({ type: "timestamp", count });
    const usage = GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC;
    this.#resolved = gpu.device.createBuffer({ size: count * 8, usage });
    this.#copy = createStorage(gpu, "timestamps", count * 8);
  }

  /** Submits `count` passes of `runs` runs each. @returns milliseconds from each pass's end to the next one's. */
  async measure(prepared: PreparedCase, runs: number): Promise<number[]> {
    const encoder = this.#gpu.device.createCommandEncoder();
    for (let sample = 0; sample < this.#count; sample++) {
      const pass = encoder.beginComputePass({
        timestampWrites: { querySet: this.#querySet, endOfPassWriteIndex: sample },
      });
      for (let run = 0; run < runs; run++) prepared.encode(pass);
      pass.end();
    }
    encoder.resolveQuerySet(this.#querySet, 0, this.#count, this.#resolved, 0);
    encoder.copyBufferToBuffer(this.#resolved, 0, this.#copy, 0, this.#count * 8);
    this.#gpu.device.queue.submit([encoder.finish()]);
    const stamps = new BigUint64Array(await readBuffer(this.#gpu, this.#copy));
    return Array.from({ length: this.#count - 1 }, (_, index) => {
      return Number((stamps[index + 1] as bigint) - (stamps[index] as bigint)) / 1e6;
    });
  }

  destroy(): void {
    this.#querySet.destroy();
    this.#resolved.destroy();
    this.#copy.destroy();
  }
}

/** Part of the warming in which the host waits for each round, to learn how long a run takes; the rest is queued. */
const WAITING_SHARE = 0.4;

/** Runs for `seconds`, waiting for each round. @returns milliseconds of one run at the end. */
async function warm(stamps: EndStamps, prepared: PreparedCase, seconds: number): Promise<number> {
  const started = performance.now();
  let runs = 1;
  let milliseconds = 0;
  do {
    const [between = 0] = await stamps.measure(prepared, runs);
    milliseconds = Math.max(between / runs, 1e-4);
    runs = Math.max(1, Math.min(MAX_RUNS, Math.round(WARM_CHUNK_MILLISECONDS / milliseconds)));
  } while (performance.now() - started < seconds * 1000);
  return milliseconds;
}

/** Runs in a sample: the plan's least number, more for short kernels, fewer for very long ones. */
export function runsPerSample(milliseconds: number, plan: TimingPlan): number {
  const wanted = Math.max(plan.minimumRuns, Math.ceil(plan.sampleMilliseconds / milliseconds));
  const longest = Math.max(1, Math.floor(LONGEST_SAMPLE_MILLISECONDS / milliseconds));
  return Math.min(wanted, longest, MAX_RUNS);
}

/**
 * Warms up with the case's own work, then measures without a gap.
 * @throws Error where the device has no timestamp queries.
 */
export async function timeCase(gpu: Gpu, prepared: PreparedCase, plan: TimingPlan): Promise<CaseTime> {
  const pair = new EndStamps(gpu, 2);
  const stamps = new EndStamps(gpu, plan.samples + 1);
  try {
    const rough = await warm(pair, prepared, plan.warmSeconds * WAITING_SHARE);
    const runs = runsPerSample(rough, plan);
    // Queued without waiting: the GPU works on it while the host encodes the samples.
    const chunk = Math.max(1, Math.min(MAX_RUNS, Math.round(WARM_CHUNK_MILLISECONDS / rough)));
    const chunks = Math.ceil((plan.warmSeconds * (1 - WAITING_SHARE) * 1000) / Math.max(chunk * rough, 1));
    for (let index = 0; index < chunks; index++) {
      submitPass(gpu, (pass) => {
        for (let run = 0; run < chunk; run++) prepared.encode(pass);
      });
    }
    const times = (await stamps.measure(prepared, runs)).map((time) => time / runs).sort((a, b) => a - b);
    return {
      median: times[times.length >> 1] as number,
      least: times[0] as number,
      most: times.at(-1) as number,
      runs,
    };
  } finally {
    pair.destroy();
    stamps.destroy();
  }
}
