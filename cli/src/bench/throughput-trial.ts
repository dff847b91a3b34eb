/** One row of `kivimesh bench throughput`: an engine of its own for a workload, a KV format and a numerics mode. */
import { type EngineConfig, type LoadedModel, loadModel, type Numerics } from "@kivimesh/worker";
import { openSession } from "./engine-session.ts";
import { memoryBreakdown } from "./memory-breakdown.ts";
import { type Budgeted, budgetedConfig } from "./memory-budget.ts";
import { measureThroughput, type ThroughputProgress } from "./throughput.ts";
import type { ThroughputRow } from "./throughput-report.ts";
import type { Workload } from "./workload.ts";

/** What an engine takes. */
const MAX_SEQUENCES = 1024;

/** Decode steps that a small prefill waits for company. */
const PREFILL_PATIENCE = 8;

export interface Trial {
  readonly workload: Workload;
  readonly kvFormat: string;
  readonly numerics: Numerics;
}

/** Which model, from where. */
export type ModelChoice = Pick<EngineConfig, "modelPath" | "dummyArchitecture" | "modelName">;

export interface TrialOptions {
  readonly source: ModelChoice;
  /** Sizes that were asked for. */
  readonly engine: EngineConfig;
  /** Bytes of GPU memory for everything; undefined: as many sequences as there are requests. */
  readonly memory?: number | undefined;
  /** Measures so long in steady state; undefined: the whole workload. */
  readonly seconds?: number | undefined;
  /** Of a whole workload, once a second. */
  readonly onProgress?: ThroughputProgress | undefined;
}

export function openChosenModel({ modelPath, dummyArchitecture = "" }: ModelChoice): Promise<LoadedModel> {
  return loadModel(modelPath === undefined ? { dummy: dummyArchitecture } : { path: modelPath });
}

/** Sequences, context and pages of the engine that runs the workload. */
async function trialConfig(trial: Trial, { source, engine, memory }: TrialOptions): Promise<Partial<Budgeted>> {
  const { requests, promptTokens, outputTokens } = trial.workload;
  const config: EngineConfig = {
    ...engine,
    ...source,
    kvFormat: trial.kvFormat,
    numerics: trial.numerics,
    // Nobody waits for a next token here: every step takes what prefill there is, and little of it waits for more.
    decodeStepsPerPrefill: 0,
    prefillPatience: PREFILL_PATIENCE,
  };
  const tokensPerSequence = promptTokens + outputTokens;
  const maxContextTokens = config.maxContextTokens ?? tokensPerSequence;
  const wantedSequences = Math.min(config.maxSequences ?? MAX_SEQUENCES, requests);
  if (memory === undefined) return { config: { ...config, maxContextTokens, maxSequences: wantedSequences } };
  const model = await openChosenModel(source);
  try {
    const budget = { budgetBytes: memory, wantedSequences, maxContextTokens, tokensPerSequence };
    return await budgetedConfig({ model, config, ...budget });
  } finally {
    model.close();
  }
}

/** Opens the engine, measures, closes it. @throws ClusterError where the budget or the GPU holds too little. */
export async function runTrial(trial: Trial, options: TrialOptions): Promise<ThroughputRow> {
  const { source, memory, seconds } = options;
  const started = performance.now();
  const { config = {}, plan } = await trialConfig(trial, options);
  const session = await openSession(config);
  const openSeconds = (performance.now() - started) / 1000;
  try {
    const { total } = memoryBreakdown(session.runner);
    if (memory !== undefined && total > memory) {
      throw new RangeError(`the engine took ${total} bytes of GPU memory, over the budget of ${memory}`);
    }
    const result = await measureThroughput(session, trial.workload, seconds, options.onProgress);
    return {
      device: session.runner.device.name,
      model: source.modelName ?? session.model.name,
      kvFormat: trial.kvFormat,
      numerics: trial.numerics,
      ...(memory === undefined ? {} : { memoryBytes: memory }),
      ...(plan === undefined ? {} : { limitedBy: plan.limitedBy }),
      openSeconds,
      ...result,
    };
  } finally {
    await session.close();
  }
}
