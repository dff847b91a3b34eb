/** `kivimesh bench throughput`: what one GPU makes of a pile of requests under one budget of memory. */
import { DEFAULT_KV_FORMAT, KV_FORMAT_NAMES } from "@kivimesh/kernels";
import type { Numerics } from "@kivimesh/worker";
import type { Command } from "commander";
import { csv, writeBenchFiles } from "../bench/bench-files.ts";
import { type FailedRow, type ThroughputRow, throughputCharts, throughputTable } from "../bench/throughput-report.ts";
import { openChosenModel, runTrial, type Trial } from "../bench/throughput-trial.ts";
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
import { countProgress } from "../progress-bar.ts";
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

function trialsOf({ workload: workloads, kvFormat, numerics }: ThroughputOptions): Trial[] {
  return workloads.flatMap((each) =>
    kvFormat.flatMap((format) => numerics.map((mode) => ({ workload: each, kvFormat: format, numerics: mode }))),
  );
}

async function runThroughputBench(options: ThroughputOptions, context: CommandContext): Promise<void> {
  const { output } = context;
  if (options.json === true && options.csv === true) throw new UsageError("--json and --csv: give one of them");
  if (options.memory !== undefined && options.kvBytes !== undefined) {
    throw new UsageError("--memory and --kv-bytes: give one of them; the KV cache takes what the budget leaves");
  }
  const source = await modelConfig(options);
  // A model that cannot be opened fails the command, not each of its rows.
  (await openChosenModel(source)).close();
  const rows: (ThroughputRow | FailedRow)[] = [];
  const { kvFormat: _formats, numerics: _modes, memory, seconds, ...rest } = options;
  const engine = engineConfig(rest);
  for (const trial of trialsOf(options)) {
    const { requests, outputTokens } = trial.workload;
    const bar = countProgress(`${trial.kvFormat} ${workloadName(trial.workload)}: tokens`, requests * outputTokens);
    const onProgress = (tokens: number) => bar.update(tokens);
    const row = await runTrial(trial, { source, engine, memory, seconds, onProgress }).catch(
      (error: unknown): FailedRow => {
        const { kvFormat, numerics } = trial;
        const name = {
          model: source.modelName ?? options.model,
          workload: workloadName(trial.workload),
          kvFormat,
          numerics,
        };
        const budget = options.memory === undefined ? {} : { memoryBytes: options.memory };
        return { ...name, ...budget, error: error instanceof Error ? error.message : String(error) };
      },
    );
    bar.stop();
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
