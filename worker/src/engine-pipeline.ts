/** The steps that were handed to the runner and whose results were not taken yet, oldest first. */
import type { BuiltStep } from "./engine-step.ts";
import type { ModelRunner, StepResult } from "./model/index.ts";
import { stepTimeoutMs, within } from "./step-timeout.ts";

export interface EndedStep {
  readonly step: BuiltStep;
  readonly result: StepResult;
  /** From when the GPU could begin it, which was free by then, to its result. */
  readonly seconds: number;
}

interface StepUnderWay {
  readonly step: BuiltStep;
  readonly result: Promise<StepResult>;
  readonly started: number;
  settled: boolean;
}

export class EnginePipeline {
  readonly #runner: ModelRunner;
  readonly #underWay: StepUnderWay[] = [];
  #lastEnded = 0;

  constructor(runner: ModelRunner) {
    this.#runner = runner;
  }

  get length(): number {
    return this.#underWay.length;
  }

  /** Settles with the oldest step. */
  get oldest(): Promise<unknown> | undefined {
    return this.#underWay[0]?.result;
  }

  /** Whether the oldest step has ended. */
  get ended(): boolean {
    return this.#underWay[0]?.settled ?? false;
  }

  start(step: BuiltStep): void {
    const started = performance.now();
    const result = within(this.#runner.step(step.plan), stepTimeoutMs[this.#runner.device.profile]);
    const underWay: StepUnderWay = { step, result, started, settled: false };
    const settle = () => {
      underWay.settled = true;
    };
    // Its failure is met when its turn comes.
    result.then(settle, settle);
    this.#underWay.push(underWay);
  }

  /** Waits for the oldest step. @throws what the runner threw. */
  async take(): Promise<EndedStep> {
    const { step, result, started } = this.#underWay[0]!;
    const value = await result;
    this.#underWay.shift();
    const ended = performance.now();
    const seconds = (ended - Math.max(started, this.#lastEnded)) / 1000;
    this.#lastEnded = ended;
    return { step, result: value, seconds };
  }

  /** Waits for all steps and drops their results. */
  async drop(): Promise<void> {
    await Promise.allSettled(this.#underWay.splice(0).map(({ result }) => result));
  }
}
