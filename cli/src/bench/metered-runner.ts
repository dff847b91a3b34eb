/** A model runner whose plans are recorded: what they held and what they cost. */
import type { ModelRunner, StepPlan, StepResult } from "@kivimesh/worker";

/** One plan. Times in milliseconds. */
export interface RecordedStep {
  /** `performance.now()` when the result was there. */
  readonly at: number;
  readonly prefillRows: number;
  readonly decodeRows: number;
  /** Times that the decode rows ran in this plan. */
  readonly decodeSteps: number;
  readonly encodeMs: number;
  /** Undefined where the device has no clock. */
  readonly gpuMs: number | undefined;
}

/** The same runner; `onStep` hears of each plan that succeeded. */
export function meteredRunner(runner: ModelRunner, onStep: (step: RecordedStep) => void): ModelRunner {
  const record = (plan: StepPlan, { seconds }: StepResult) =>
    onStep({
      at: performance.now(),
      prefillRows: plan.prefill.reduce((sum, { tokens }) => sum + tokens.length, 0),
      decodeRows: plan.decode.length,
      decodeSteps: plan.decode.length === 0 ? 0 : (plan.decodeSteps ?? 1),
      encodeMs: seconds.encode * 1000,
      gpuMs: seconds.gpu === undefined ? undefined : seconds.gpu * 1000,
    });
  return {
    config: runner.config,
    kv: runner.kv,
    limits: runner.limits,
    device: runner.device,
    lost: runner.lost,
    async step(plan) {
      const result = await runner.step(plan);
      record(plan, result);
      return result;
    },
    readBlock: (page) => runner.readBlock(page),
    writeBlock: (page, payload) => runner.writeBlock(page, payload),
    memory: () => runner.memory(),
    close: () => runner.close(),
  };
}

/** Median milliseconds of one decode step: on the host, on the GPU, and between results. */
export interface DecodeStepCost {
  readonly steps: number;
  readonly encodeMs: number;
  readonly gpuMs: number | undefined;
  readonly wallMs: number;
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[sorted.length >> 1] ?? 0;
}

/**
 * Of the plans without prefill that followed another plan; several plans may be under way at once, so the wall time of a
 * step is the time from result to result.
 */
export function decodeStepCost(steps: readonly RecordedStep[]): DecodeStepCost | undefined {
  const decode = steps.flatMap((step, index) => {
    const before = steps[index - 1];
    if (before === undefined || step.prefillRows > 0 || step.decodeSteps === 0) return [];
    return [{ ...step, wallMs: step.at - before.at }];
  });
  if (decode.length === 0) return undefined;
  const each = (of: (step: (typeof decode)[number]) => number) =>
    median(decode.map((step) => of(step) / step.decodeSteps));
  const hasClock = decode.every(({ gpuMs }) => gpuMs !== undefined);
  return {
    steps: decode.reduce((sum, { decodeSteps }) => sum + decodeSteps, 0),
    encodeMs: each(({ encodeMs }) => encodeMs),
    gpuMs: hasClock ? each(({ gpuMs }) => gpuMs ?? 0) : undefined,
    wallMs: each(({ wallMs }) => wallMs),
  };
}
