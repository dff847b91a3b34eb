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
  /** Runs each case, so that several benches can take turns on one GPU. Default: at once. */
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

async function runCase(each: KernelCase, options: CaseRunOptions): Promise<BenchResult> {
  const { gpu } = options;
  const errors: string[] = [];
  const note = (event: Event) => errors.push((event as GPUUncapturedErrorEvent).error.message.slice(0, 500));
  gpu.device.addEventListener("uncapturederror", note);
  let prepared: PreparedCase | undefined;
  try {
    prepared = await bounded(gpu, each.prepare(gpu));
    const result = await bounded(gpu, checkAndTime(each, prepared, options));
    return errors[0] === undefined ? result : { ...result, error: errors[0] };
  } catch (error) {
    if (error instanceof CaseUnsupportedError) return { ...caseName(each), skipped: error.message };
    if (error instanceof DeviceGoneError) throw error;
    return { ...caseName(each), error: [message(error), ...errors].join("; ") };
  } finally {
    prepared?.destroy();
    gpu.device.removeEventListener("uncapturederror", note);
  }
}

/** Runs the cases in order. A lost device fails those that are left. */
export async function runCases(cases: readonly KernelCase[], options: CaseRunOptions): Promise<BenchResult[]> {
  const results: BenchResult[] = [];
  let gone: string | undefined;
  for (const each of cases) {
    let result: BenchResult;
    if (gone !== undefined) result = { ...caseName(each), error: gone };
    else if (performance.now() > options.deadline) result = { ...caseName(each), skipped: "the time was up" };
    else {
      try {
        const run = () => runCase(each, options);
        result = await (options.exclusively === undefined ? run() : options.exclusively(run));
      } catch (error) {
        gone = message(error);
        result = { ...caseName(each), error: gone };
      }
    }
    results.push(result);
    options.onResult(result);
  }
  return results;
}
