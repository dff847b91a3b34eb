/** Runs a list of cases: each one alone, so that what fails is one row and the others still count. */
import { type Gpu, submitPass } from "../src/index.ts";
import { type BenchResult, caseName, measuredResult } from "./bench-result.ts";
import { CaseUnsupportedError } from "./case-error.ts";
import { type TimingPlan, timeCase } from "./case-timing.ts";
import type { DeviceRoofs } from "./device-roofs.ts";
import type { KernelCase, PreparedCase } from "./kernel-case.ts";

export interface CaseRunOptions {
  readonly gpu: Gpu;
  readonly roofs: DeviceRoofs;
  readonly timing: TimingPlan;
  /** Cases that have not begun by then are not run, and their rows say so. */
  readonly deadline: number;
  readonly onResult: (result: BenchResult) => void;
  /** Runs each batch of cases, so that several benches can take turns on one GPU. Default: at once. */
  readonly exclusively?: <T>(work: () => Promise<T>) => Promise<T>;
}

/** A case that takes longer hangs: the GPU cannot be used any more. */
const CASE_SECONDS = 60;

function message(error: unknown): string {
  return (error instanceof Error ? `${error.name}: ${error.message}` : String(error)).slice(0, 500);
}

/** Waits for `work`, for the loss of the device, or for too long. */
async function bounded<T>(gpu: Gpu, work: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new DeviceGoneError(`no answer in ${CASE_SECONDS} s`)), CASE_SECONDS * 1000);
  });
  const lost = gpu.lost.then((reason): never => {
    throw new DeviceGoneError(`device lost: ${reason}`);
  });
  try {
    return await Promise.race([work, late, lost]);
  } finally {
    clearTimeout(timer);
  }
}

/** Nothing more can run on this device. */
class DeviceGoneError extends Error {
  override readonly name = "DeviceGoneError";
}

/** One run on poisoned outputs, compared with the reference; then the timing. */
async function checkAndTime(each: KernelCase, prepared: PreparedCase, options: CaseRunOptions): Promise<BenchResult> {
  const { gpu, roofs, timing } = options;
  prepared.poison();
  submitPass(gpu, (pass) => prepared.encode(pass));
  const relativeError = await prepared.check();
  const time = await timeCase(gpu, prepared, timing);
  return measuredResult(each, time, { relativeError, tolerance: prepared.tolerance }, roofs);
}

/** Collects what the device complains about while `work` runs. */
async function withErrors<T>(
  gpu: Gpu,
  work: () => Promise<T>,
): Promise<{ readonly value: T; readonly errors: string[] }> {
  const errors: string[] = [];
  const note = (event: Event) => errors.push((event as GPUUncapturedErrorEvent).error.message.slice(0, 500));
  gpu.device.addEventListener("uncapturederror", note);
  try {
    const value = await work();
    // Complaints about what was submitted come with the work's end at the latest.
    await bounded(gpu, gpu.device.queue.onSubmittedWorkDone());
    return { value, errors };
  } finally {
    gpu.device.removeEventListener("uncapturederror", note);
  }
}

type Preparation = { readonly prepared: PreparedCase } | { readonly result: BenchResult };

async function prepareCase(each: KernelCase, gpu: Gpu): Promise<Preparation> {
  try {
    return { prepared: await bounded(gpu, each.prepare(gpu)) };
  } catch (error) {
    if (error instanceof CaseUnsupportedError) return { result: { ...caseName(each), skipped: error.message } };
    if (error instanceof DeviceGoneError) throw error;
    return { result: { ...caseName(each), error: message(error) } };
  }
}

async function runPrepared(each: KernelCase, prepared: PreparedCase, options: CaseRunOptions): Promise<BenchResult> {
  const { gpu } = options;
  const { value, errors } = await withErrors(gpu, async () => {
    try {
      return await bounded(gpu, checkAndTime(each, prepared, options));
    } catch (error) {
      if (error instanceof DeviceGoneError) throw error;
      return { ...caseName(each), error: message(error) };
    }
  });
  return errors[0] === undefined ? value : { ...value, error: [value.error, ...errors].filter(Boolean).join("; ") };
}

/** Prepares a few cases side by side, since compilers are slow and have threads of their own; then runs one by one. */
async function runBatch(batch: readonly KernelCase[], options: CaseRunOptions): Promise<void> {
  const { gpu, onResult } = options;
  const { value: preparations, errors } = await withErrors(gpu, () => {
    return Promise.all(batch.map((each) => prepareCase(each, gpu)));
  });
  try {
    for (const [index, each] of batch.entries()) {
      const preparation = preparations[index] as Preparation;
      if ("result" in preparation) onResult(preparation.result);
      // Whose complaint it was is not known: none of them can be trusted.
      else if (errors[0] !== undefined) onResult({ ...caseName(each), error: errors.join("; ") });
      else if (performance.now() > options.deadline) onResult({ ...caseName(each), skipped: "the time was up" });
      else onResult(await runPrepared(each, preparation.prepared, options));
    }
  } finally {
    for (const preparation of preparations) if ("prepared" in preparation) preparation.prepared.destroy();
  }
}

/** Cases prepared together, at most: so many, and so many bytes of a single run of each. */
const BATCH = { software: 1, hardware: 8 } as const;
const BATCH_BYTES = 4e9;

function* batches(cases: readonly KernelCase[], most: number): Generator<KernelCase[]> {
  let batch: KernelCase[] = [];
  let bytes = 0;
  for (const each of cases) {
    if (batch.length > 0 && (batch.length >= most || bytes + each.bytes > BATCH_BYTES)) {
      yield batch;
      batch = [];
      bytes = 0;
    }
    batch.push(each);
    bytes += each.bytes;
  }
  if (batch.length > 0) yield batch;
}

/** Runs the cases in order. A lost device fails those that are left. */
export async function runCases(cases: readonly KernelCase[], options: CaseRunOptions): Promise<BenchResult[]> {
  const results: BenchResult[] = [];
  const onResult = (result: BenchResult) => {
    results.push(result);
    options.onResult(result);
  };
  let gone: string | undefined;
  for (const batch of batches(cases, BATCH[options.gpu.profile])) {
    const done = results.length;
    const fill = (rest: Pick<BenchResult, "error" | "skipped">) => {
      for (const each of batch.slice(results.length - done)) onResult({ ...caseName(each), ...rest });
    };
    if (gone !== undefined) fill({ error: gone });
    else if (performance.now() > options.deadline) fill({ skipped: "the time was up" });
    else {
      const run = () => runBatch(batch, { ...options, onResult });
      try {
        await (options.exclusively === undefined ? run() : options.exclusively(run));
      } catch (error) {
        gone = message(error);
        fill({ error: gone });
      }
    }
  }
  return results;
}
