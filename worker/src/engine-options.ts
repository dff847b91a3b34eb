import { ClusterError } from "@kivimesh/proto";
import type { BlockTransfer } from "./block-transfer.ts";
import type { Numerics } from "./config.ts";
import type { GenerationEvent } from "./generation.ts";
import type { ModelRunner } from "./model/index.ts";
import type { PrefixIndexChange } from "./page-pool.ts";

export interface EngineOptions {
  readonly runner: ModelRunner;
  /** 32 bytes. */
  readonly modelDigest: Uint8Array;
  readonly numerics: Numerics;
  /** Prefill rows of one step; at least R and at most the runner's. */
  readonly maxPrefillRows: number;
  /** See SchedulerLimits. */
  readonly decodeStepsPerPrefill: number;
  /** See SchedulerLimits. */
  readonly prefillPatience: number;
  /** Most decode steps in one submit: tokens come in groups of that size, where the host has nothing else to do. */
  readonly decodeStepsPerSubmit: number;
  /** How long the decode steps of one submit may take together, in milliseconds: a new request or an abort waits for it. */
  readonly submitLatencyMs: number;
  /** Submits that may be under way at once; from 2 on, one is encoded while another runs. At most the runner's. */
  readonly submitsInFlight: number;
  /** Gets what happened, once a step. */
  readonly onEvents: (events: readonly GenerationEvent[]) => void;
  readonly onPrefixChange?: (change: PrefixIndexChange) => void;
  /** After every step and when the engine falls idle. */
  readonly onStats?: () => void;
  /** The GPU or the runner failed: every sequence has failed, and nothing runs any more. */
  readonly onFailure?: (error: Error) => void;
  readonly transfer?: BlockTransfer;
}

/** @throws ClusterError INVALID_ARGUMENT for a prefill budget below one window, or what the runner does not take. */
export function checkEngineOptions(options: EngineOptions): void {
  const { runner, maxPrefillRows, decodeStepsPerSubmit, submitsInFlight } = options;
  const { kv, limits } = runner;
  if (maxPrefillRows < kv.residualTokens || maxPrefillRows > limits.maxPrefillRows) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `maxPrefillRows is ${maxPrefillRows}: it must be between residualTokens, ${kv.residualTokens}, and ${limits.maxPrefillRows}`,
    );
  }
  const check = (parameter: string, value: number, most: number) => {
    if (Number.isInteger(value) && value >= 1 && value <= most) return;
    throw new ClusterError("INVALID_ARGUMENT", `${parameter} is ${value}: it must be 1 to ${most}`, { parameter });
  };
  check("decodeStepsPerSubmit", decodeStepsPerSubmit, limits.maxDecodeSteps);
  check("submitsInFlight", submitsInFlight, limits.maxStepsInFlight);
}
