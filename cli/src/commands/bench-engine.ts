/** `kivimesh bench engine`: prefill and decode of equal prompts, over batch and context. */
import { blockBytes, DEFAULT_KV_FORMAT, type KvShape, kvFormat } from "@kivimesh/kernels";
import { type EngineConfig, type LoadedModel, loadModel } from "@kivimesh/worker";
import type { Command } from "commander";
import { csv, writeBenchFiles } from "../bench/bench-files.ts";
import type { EnginePoint, EnginePointResult } from "../bench/engine-point.ts";
import { sequenceTokens } from "../bench/engine-point.ts";
import { openSession } from "../bench/engine-session.ts";
import { measureSweep, pointBlocks, type SweepRow, sweepCharts, sweepPoints } from "../bench/engine-sweep.ts";
import { budgetedConfig } from "../bench/memory-budget.ts";
import {
  addEngineOptions,
  addModelOptions,
  type EngineOptions,
  engineConfig,
  type ModelOptions,
  modelConfig,
} from "../common-options.ts";
import { bytes, integer, listOf, option } from "../option-values.ts";
import { formatBytes, formatTable } from "../output.ts";
import { UsageError } from "../usage-error.ts";
import type { CommandContext } from "./command-context.ts";

interface BenchOptions extends ModelOptions, EngineOptions {
  readonly batch: number[];
  readonly promptTokens: number[];
  readonly context?: number[];
  readonly outputTokens: number;
  readonly memory?: number;
  readonly json?: boolean;
  readonly csv?: boolean;
  readonly out?: string;
}

const DEFAULT_BLOCK_TOKENS = 128;

const EXAMPLES = `
Examples:
  kivimesh bench engine
  kivimesh bench engine --kv-format kivi4 --batch 4 --context 1024 --output-tokens 64 --json
  kivimesh bench engine --load-format dummy --architecture llama-3.1-8b --batch 1,16,64 --context 128,4096 --out sweep`;

export function addEngineBench(bench: Command, context: CommandContext): void {
  const engine = bench
    .command("engine")
    .description("tokens a second of prefill and decode over batch and context, and GPU memory by use");
  addEngineOptions(addModelOptions(engine))
    .addOption(
      option("--batch <list>", "sequences at once; several parted by commas")
        .argParser(listOf(integer(1, 1024)))
        .default([1], "1"),
    )
    .addOption(
      option("--prompt-tokens <list>", "tokens of each prompt; several parted by commas")
        .argParser(listOf(integer(1)))
        .default([512], "512"),
    )
    .addOption(option("--context <list>", "the same, instead of --prompt-tokens").argParser(listOf(integer(1))))
    .addOption(option("--output-tokens <n>", "tokens of each answer").argParser(integer(1)).default(64))
    .addOption(
      option(
        "--memory <bytes>",
        "GPU memory for everything, such as 80GiB; what then does not fit is skipped",
      ).argParser(bytes),
    )
    .addOption(option("--json", "as JSON: an object, or an array where there are several batches or contexts"))
    .addOption(option("--csv", "as comma-separated values"))
    .addOption(option("--out <base>", "also writes BASE.json, BASE.csv and plots, BASE-*.svg"))
    .addHelpText("after", EXAMPLES)
    .action((options: BenchOptions) => runEngineBench(options, context));
}

/** What the pool must hold for the largest point, in bytes. */
function pointBytes(points: readonly EnginePoint[], model: LoadedModel, options: BenchOptions): number {
  const { layers, kvHeads, headDim } = model.config;
  const blockTokens = options.blockTokens ?? DEFAULT_BLOCK_TOKENS;
  const residualTokens = options.residualTokens ?? blockTokens;
  const shape: KvShape = { layers, kvHeads, headDim, blockTokens, residualTokens };
  const blocks = Math.max(...points.map((point) => pointBlocks(point, blockTokens)));
  return blocks * blockBytes(kvFormat(options.kvFormat ?? DEFAULT_KV_FORMAT), shape);
}

/** Sizes that hold the largest point, or as much as the budget allows. */
async function sweepConfig(points: readonly EnginePoint[], options: BenchOptions, source: EngineConfig) {
  const { modelPath, dummyArchitecture = "" } = source;
  const model = await loadModel(modelPath === undefined ? { dummy: dummyArchitecture } : { path: modelPath });
  try {
    const maxSequences = Math.max(...options.batch, options.maxSequences ?? 0);
    const longest = Math.min(Math.max(...points.map(sequenceTokens)), model.config.contextTokens);
    const needed = pointBytes(points, model, options);
    const config: EngineConfig = {
      maxContextTokens: longest,
      ...dropUndefined(engineConfig(options)),
      ...source,
      maxSequences,
    };
    if (options.memory === undefined) return { kvBytes: needed, ...config };
    const budget = { budgetBytes: options.memory, wantedSequences: maxSequences, maxContextTokens: longest };
    // A sequence's length is for the points to decide: the plan only has to find what is left for pages.
    const planned = await budgetedConfig({ model, config, ...budget, tokensPerSequence: 1 });
    if (planned.plan.maxSequences < maxSequences) {
      throw new UsageError(`--memory: ${planned.plan.maxSequences} sequences fit, not the ${maxSequences} of --batch`);
    }
    return { ...planned.config, kvBytes: Math.min(needed, planned.plan.kvBytes) };
  } finally {
    model.close();
  }
}

async function runEngineBench(options: BenchOptions, { output }: CommandContext): Promise<void> {
  if (options.json === true && options.csv === true) throw new UsageError("--json and --csv: give one of them");
  if (options.memory !== undefined && options.kvBytes !== undefined) {
    throw new UsageError("--memory and --kv-bytes: give one of them; the KV cache takes what the budget leaves");
  }
  const points = sweepPoints(options.batch, options.context ?? options.promptTokens, options.outputTokens);
  const source = await modelConfig(options);
  const session = await openSession(await sweepConfig(points, options, source));
  try {
    const named = (row: SweepRow): SweepRow =>
      "skipped" in row ? row : { ...row, model: source.modelName ?? row.model };
    const measured = await measureSweep(session, points, (row) => {
      if (points.length > 1) output.notice(progressLine(row));
    });
    const rows = measured.map(named);
    if (options.out !== undefined) {
      for (const file of writeBenchFiles(options.out, rows, sweepCharts(rows))) output.notice(`wrote ${file}`);
    }
    if (options.json === true) output.json(rows.length === 1 ? rows[0] : rows);
    else if (options.csv === true) output.write(csv(rows));
    else output.line(rows.length === 1 && rows[0] !== undefined ? format(rows[0]) : formatSweep(rows));
  } finally {
    await session.close();
  }
}

function dropUndefined<T extends object>(value: T): T {
  return Object.fromEntries(Object.entries(value).filter(([, field]) => field !== undefined)) as T;
}

function progressLine(row: SweepRow): string {
  const name = `batch ${row.batch}, context ${row.promptTokens}`;
  if ("skipped" in row) return `${name}: skipped, ${row.skipped}`;
  return `${name}: prefill ${row.prefillTokensPerSecond.toFixed(0)}, decode ${row.decodeTokensPerSecond.toFixed(1)} tokens/s`;
}

function milliseconds(value: number | undefined): string {
  return value === undefined ? "" : `${value.toFixed(2)} ms`;
}

function memoryLine({ peakGpuBytes }: EnginePointResult): string {
  const { weights, kvPages, kvResidual, activations, other } = peakGpuBytes;
  const parts = { weights, "KV pages": kvPages, "KV residual": kvResidual, activations, other };
  return Object.entries(parts)
    .map(([name, bytes]) => `${name} ${formatBytes(bytes)}`)
    .join(", ");
}

function format(row: SweepRow): string {
  if ("skipped" in row) return progressLine(row);
  const { decodeStep, interTokenMs } = row;
  const step = `encode ${milliseconds(decodeStep?.encodeMs)}, GPU ${milliseconds(decodeStep?.gpuMs) || "unknown"}, wall ${milliseconds(decodeStep?.wallMs)}`;
  return formatTable(
    ["engine bench", ""],
    [
      ["device", row.device],
      ["model", row.model],
      ["KV format", row.kvFormat],
      ["batch", `${row.batch} × (${row.promptTokens} prompt + ${row.outputTokens} output tokens)`],
      ["prefill", `${row.prefillTokensPerSecond.toFixed(1)} tokens/s`],
      ["decode", `${row.decodeTokensPerSecond.toFixed(1)} tokens/s`],
      ["time to first token", `${row.ttftSeconds.toFixed(2)} s`],
      ["between tokens", `${milliseconds(interTokenMs?.p50)} (99 %: ${milliseconds(interTokenMs?.p99)})`],
      ["decode step", step],
      ["GPU memory", memoryLine(row)],
    ],
  );
}

function formatSweep(rows: readonly SweepRow[]): string {
  const table = formatTable(
    ["batch", "context", "prefill, tokens/s", "decode, tokens/s", "ITL p50", "encode", "GPU", "wall"],
    rows.map((row) => {
      const name = [row.batch, row.promptTokens];
      if ("skipped" in row) return [...name, `skipped: ${row.skipped}`, "", "", "", "", ""];
      const { decodeStep, interTokenMs } = row;
      return [
        ...name,
        row.prefillTokensPerSecond.toFixed(1),
        row.decodeTokensPerSecond.toFixed(1),
        milliseconds(interTokenMs?.p50),
        milliseconds(decodeStep?.encodeMs),
        milliseconds(decodeStep?.gpuMs),
        milliseconds(decodeStep?.wallMs),
      ];
    }),
  );
  const first = rows.find((row): row is EnginePointResult => !("skipped" in row));
  if (first === undefined) return table;
  return `${first.device}; ${first.model}; KV ${first.kvFormat}\n${table}\nGPU memory: ${memoryLine(first)}`;
}
