/** `kivimesh bench throughput`: what one GPU makes of a pile of requests under one budget of memory. */
import { DEFAULT_KV_FORMAT, KV_FORMAT_NAMES } from "@kivimesh/kernels";
import { type EngineConfig, type LoadedModel, loadModel, type Numerics } from "@kivimesh/worker";
import type { Command } from "commander";
import { csv, writeBenchFiles } from "../bench/bench-files.ts";
import { openSession } from "../bench/engine-session.ts";
import { type Budgeted, budgetedConfig } from "../bench/memory-budget.ts";
import { measureThroughput } from "../bench/throughput.ts";
import { type FailedRow, type ThroughputRow, throughputCharts, throughputTable } from "../bench/throughput-report.ts";
import { type Workload, workload, workloadName } from "../bench/workload.ts";
import {
  addEngineOptions,
  addModelOptions,
  type EngineOptions,
  engineConfig,
  type ModelOptions,
  modelConfig,
} from "../common-options.ts";
import { bytes, decimal, listOf, oneOf, option } from "../option-values.ts";
import { UsageError } from "../usage-error.ts";
import { type CommandContext, EXIT } from "./command-context.ts";

interface ThroughputOptions extends ModelOptions, Omit<EngineOptions, "kvFormat" | "numerics"> {
  readonly kvFormat: string[];
  readonly numerics: Numerics[];
  readonly workload: Workload[];
  readonly memory?: number;
  readonly seconds?: number;
  readonly json?: boolean;
  readonly csv?: boolean;
  readonly out?: string;
}

const NUMERICS: readonly Numerics[] = ["invariant", "fast"];
/** What an engine takes. */
const MAX_SEQUENCES = 1024;
const DEFAULT_WORKLOAD: Workload = { requests: 16, promptTokens: 161, outputTokens: 338 };

const EXAMPLES = `
Examples:
  kivimesh bench throughput --workload 16x161+338
  kivimesh bench throughput --model dummy:llama-2-7b --memory 80GiB --workload 1000x161+338,128x4096+512 \\
    --kv-format f16,kivi2,kivi2r --numerics invariant,fast --out docs/results/engine`;

export function addThroughputBench(bench: Command, context: CommandContext): void {
  const throughput = bench
    .command("throughput")
    .description("output tokens a second of a workload, largest batch and KV capacity under one budget of GPU memory");
  addEngineOptions(addModelOptions(throughput), ["kv-format", "numerics"])
    .addOption(
      option("--kv-format <formats>", `one or more of ${KV_FORMAT_NAMES.join(", ")}, parted by commas`)
        .argParser(listOf(oneOf(KV_FORMAT_NAMES)))
        .default([DEFAULT_KV_FORMAT], DEFAULT_KV_FORMAT),
    )
    .addOption(
      option("--numerics <modes>", "invariant, fast, or both parted by commas")
        .argParser(listOf(oneOf(NUMERICS)))
        .default(["invariant"], "invariant"),
    )
    .addOption(
      option("--workload <list>", "REQUESTSxPROMPT+OUTPUT tokens; several parted by commas")
        .argParser(listOf(workload))
        .default([DEFAULT_WORKLOAD], workloadName(DEFAULT_WORKLOAD)),
    )
    .addOption(option("--memory <bytes>", "GPU memory for everything, such as 80GiB").argParser(bytes))
    .addOption(
      option("--seconds <s>", "measures so long in steady state, instead of each whole workload").argParser(
        decimal(0.1, 86_400),
      ),
    )
    .addOption(option("--json", "as JSON"))
    .addOption(option("--csv", "as comma-separated values"))
    .addOption(option("--out <base>", "also writes BASE.json, BASE.csv and plots, BASE-*.svg"))
    .addHelpText("after", EXAMPLES)
    .action((options: ThroughputOptions) => runThroughputBench(options, context));
}

/** One engine: a workload, a KV format and a numerics mode. */
interface Trial {
  readonly workload: Workload;
  readonly kvFormat: string;
  readonly numerics: Numerics;
}

function trialsOf({ workload: workloads, kvFormat, numerics }: ThroughputOptions): Trial[] {
  return workloads.flatMap((each) =>
    kvFormat.flatMap((format) => numerics.map((mode) => ({ workload: each, kvFormat: format, numerics: mode }))),
  );
}

type Source = Awaited<ReturnType<typeof modelConfig>>;

/** Sequences, context and pages of the engine that runs the workload. */
async function trialConfig(trial: Trial, options: ThroughputOptions, source: Source): Promise<Partial<Budgeted>> {
  const { requests, promptTokens, outputTokens } = trial.workload;
  const { kvFormat: _formats, numerics: _modes, ...rest } = options;
  const given: EngineConfig = {
    ...engineConfig(rest),
    ...source,
    kvFormat: trial.kvFormat,
    numerics: trial.numerics,
    // Nobody waits for a next token here: every step takes what prefill there is.
    decodeStepsPerPrefill: 0,
  };
  const tokensPerSequence = promptTokens + outputTokens;
  const maxContextTokens = given.maxContextTokens ?? tokensPerSequence;
  const wantedSequences = Math.min(given.maxSequences ?? MAX_SEQUENCES, requests);
  if (options.memory === undefined) return { config: { ...given, maxContextTokens, maxSequences: wantedSequences } };
  const model = await openModel(source);
  try {
    const budget = { budgetBytes: options.memory, wantedSequences, maxContextTokens, tokensPerSequence };
    return await budgetedConfig({ model, config: given, ...budget });
  } finally {
    model.close();
  }
}

async function runTrial(trial: Trial, options: ThroughputOptions, source: Source): Promise<ThroughputRow> {
  const started = performance.now();
  const { config = {}, plan } = await trialConfig(trial, options, source);
  const session = await openSession(config);
  const openSeconds = (performance.now() - started) / 1000;
  try {
    const result = await measureThroughput(session, trial.workload, options.seconds);
    return {
      device: session.runner.device.name,
      model: source.modelName ?? session.model.name,
      kvFormat: trial.kvFormat,
      numerics: trial.numerics,
      ...(options.memory === undefined ? {} : { memoryBytes: options.memory }),
      ...(plan === undefined ? {} : { limitedBy: plan.limitedBy }),
      openSeconds,
      ...result,
    };
  } finally {
    await session.close();
  }
}

function openModel({ modelPath, dummyArchitecture = "" }: Source): Promise<LoadedModel> {
  return loadModel(modelPath === undefined ? { dummy: dummyArchitecture } : { path: modelPath });
}

async function runThroughputBench(options: ThroughputOptions, context: CommandContext): Promise<void> {
  const { output } = context;
  if (options.json === true && options.csv === true) throw new UsageError("--json and --csv: give one of them");
  if (options.memory !== undefined && options.kvBytes !== undefined) {
    throw new UsageError("--memory and --kv-bytes: give one of them; the KV cache takes what the budget leaves");
  }
  const source = await modelConfig(options);
  // A model that cannot be opened fails the command, not each of its rows.
  (await openModel(source)).close();
  const rows: (ThroughputRow | FailedRow)[] = [];
  for (const trial of trialsOf(options)) {
    const row = await runTrial(trial, options, source).catch((error: unknown): FailedRow => {
      const { kvFormat, numerics } = trial;
      const name = {
        model: source.modelName ?? options.model,
        workload: workloadName(trial.workload),
        kvFormat,
        numerics,
      };
      const budget = options.memory === undefined ? {} : { memoryBytes: options.memory };
      return { ...name, ...budget, error: error instanceof Error ? error.message : String(error) };
    });
    rows.push(row);
    output.notice(throughputTable([row]).split("\n")[1] ?? "");
  }
  if (options.out !== undefined) {
    for (const file of writeBenchFiles(options.out, rows, throughputCharts(rows))) output.notice(`wrote ${file}`);
  }
  if (options.json === true) output.json(rows);
  else if (options.csv === true) output.write(csv(rows));
  else output.line(throughputTable(rows));
  if (rows.some((row) => "error" in row)) context.exitWith(EXIT.failure);
}
