/** `kivimesh bench engine`: how fast one engine is on this machine's GPU. */
import { openEngine } from "@kivimesh/worker";
import type { Command } from "commander";
import { benchEngine, type EngineBenchResult } from "../bench-engine.ts";
import {
  addEngineOptions,
  addModelOptions,
  type EngineOptions,
  engineConfig,
  type ModelOptions,
  modelConfig,
} from "../common-options.ts";
import { integer, option } from "../option-values.ts";
import { formatBytes, formatTable } from "../output.ts";
import type { CommandContext } from "./command-context.ts";

interface BenchOptions extends ModelOptions, EngineOptions {
  readonly batch: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  kivimesh bench engine
  kivimesh bench engine --kv-format kivi4 --batch 4 --prompt-tokens 1024 --output-tokens 64 --json
  kivimesh bench engine --load-format dummy --architecture llama-3.1-8b --batch 16`;

export function addBenchCommand(program: Command, context: CommandContext): void {
  const bench = program.command("bench").description("measure this machine");
  const engine = bench.command("engine").description("tokens a second of prefill and decode, and GPU memory by use");
  addEngineOptions(addModelOptions(engine))
    .addOption(option("--batch <n>", "sequences at once").argParser(integer(1, 1024)).default(1))
    .addOption(option("--prompt-tokens <n>", "tokens of each prompt").argParser(integer(1)).default(512))
    .addOption(option("--output-tokens <n>", "tokens of each answer").argParser(integer(1)).default(64))
    .addOption(option("--json", "as JSON"))
    .addHelpText("after", EXAMPLES)
    .action((options: BenchOptions) => runEngineBench(options, context));
}

async function runEngineBench(options: BenchOptions, { output }: CommandContext): Promise<void> {
  const { batch, promptTokens, outputTokens } = options;
  const model = await modelConfig(options);
  const engine = await openEngine({
    maxContextTokens: promptTokens + outputTokens,
    ...dropUndefined(engineConfig(options)),
    ...model,
    maxSequences: Math.max(batch, options.maxSequences ?? 0),
  });
  try {
    const measured = await benchEngine(engine, { batch, promptTokens, outputTokens });
    const result = { ...measured, model: model.modelName ?? measured.model };
    if (options.json === true) output.json(result);
    else output.line(format(result));
  } finally {
    await engine.close();
  }
}

function dropUndefined<T extends object>(value: T): T {
  return Object.fromEntries(Object.entries(value).filter(([, field]) => field !== undefined)) as T;
}

function format(result: EngineBenchResult): string {
  const { weights, kv, activations, other } = result.peakGpuBytes;
  return formatTable(
    ["engine bench", ""],
    [
      ["device", result.device],
      ["model", result.model],
      ["KV format", result.kvFormat],
      ["batch", `${result.batch} × (${result.promptTokens} prompt + ${result.outputTokens} output tokens)`],
      ["prefill", `${result.prefillTokensPerSecond.toFixed(1)} tokens/s`],
      ["decode", `${result.decodeTokensPerSecond.toFixed(1)} tokens/s`],
      ["time to first token", `${result.ttftSeconds.toFixed(2)} s`],
      [
        "GPU memory",
        `weights ${formatBytes(weights)}, KV ${formatBytes(kv)}, activations ${formatBytes(activations)}, other ${formatBytes(other)}`,
      ],
    ],
  );
}
