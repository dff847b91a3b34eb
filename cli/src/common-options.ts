/** Options that several commands share, under one name and with one meaning. */
import { KV_FORMAT_NAMES } from "@kivimesh/kernels";
import type { EngineConfig, Numerics } from "@kivimesh/worker";
import type { Command, Option } from "commander";
import { DEFAULT_MODEL } from "./model/known-models.ts";
import { resolveModel } from "./model/model-source.ts";
import { bytes, integer, option } from "./option-values.ts";

export interface ModelOptions {
  readonly model: string;
  readonly loadFormat: "auto" | "dummy";
  readonly architecture?: string;
  readonly seed?: number;
}

/** Which model, from where. */
export function addModelOptions(command: Command): Command {
  return command
    .addOption(
      option(
        "-m, --model <model>",
        "a known name, hf:owner/repository[/file.gguf], a .gguf file or a folder, or dummy:ARCHITECTURE",
      ).default(DEFAULT_MODEL),
    )
    .addOption(
      option("--load-format <format>", "auto: the model's weights; dummy: random ones of --architecture")
        .choices(["auto", "dummy"])
        .default("auto"),
    )
    .addOption(
      option("--architecture <name>", "with --load-format dummy: its shape, such as tiny-llama or llama-3.1-8b"),
    );
}

export interface EngineOptions {
  readonly kvFormat?: string;
  readonly kvBytes?: number;
  readonly maxSequences?: number;
  readonly maxPrefillRows?: number;
  readonly decodeStepsPerPrefill?: number;
  readonly decodeStepsPerSubmit?: number;
  readonly maxContextTokens?: number;
  readonly blockTokens?: number;
  readonly residualTokens?: number;
  readonly numerics?: Numerics;
  readonly gpuAdapter?: string;
}

/** How the engine runs it. */
function engineOptions(): Option[] {
  return [
    option("--kv-format <format>", "how sealed KV blocks are quantized (default: kivi2r)").choices(KV_FORMAT_NAMES),
    option("--kv-bytes <bytes>", "GPU memory for sealed KV blocks, such as 512MiB").argParser(bytes),
    option("--max-sequences <n>", "sequences that run at once").argParser(integer(1, 1024)),
    option("--max-prefill-rows <n>", "prompt tokens of one step").argParser(integer(1)),
    option(
      "--decode-steps-per-prefill <n>",
      "decode steps between two prefill steps; 0: prompts first (default: 1 on a GPU, 4 on a software driver)",
    ).argParser(integer(0)),
    option(
      "--decode-steps-per-submit <n>",
      "most decode steps handed to the GPU at once (default: 8 on a GPU, 1 on a software driver)",
    ).argParser(integer(1)),
    option("--max-context-tokens <n>", "longest sequence").argParser(integer(1)),
    option("--block-tokens <n>", "tokens of a KV block (default: 128)").argParser(integer(1)),
    option("--residual-tokens <n>", "newest tokens kept as f16 (default: 128)").argParser(integer(1)),
    option(
      "--numerics <mode>",
      "invariant: results depend on nothing but the request; fast: equal up to rounding",
    ).choices(["invariant", "fast"]),
    option("--gpu-adapter <name>", "part of the GPU's name, where there are several"),
  ];
}

/** @param except long names of those that the command has in a form of its own. */
export function addEngineOptions(command: Command, except: readonly string[] = []): Command {
  for (const each of engineOptions()) if (!except.includes(each.name())) command.addOption(each);
  return command;
}

/** What the engine is to load. @throws ClusterError where the model is not on this machine. */
export async function modelConfig(
  options: ModelOptions,
): Promise<Pick<EngineConfig, "modelPath" | "dummyArchitecture" | "modelName">> {
  const [, named] = /^dummy:(.+)$/.exec(options.model) ?? [];
  if (named !== undefined || options.loadFormat === "dummy") {
    const architecture = named ?? options.architecture ?? "tiny-llama";
    return { dummyArchitecture: architecture, modelName: architecture };
  }
  const { path, name } = await resolveModel(options.model);
  return { modelPath: path, modelName: name };
}

/** The engine's configuration of those options; what was not given is left out. */
export function engineConfig(options: EngineOptions): EngineConfig {
  const { kvFormat, kvBytes, maxSequences, maxPrefillRows, maxContextTokens } = options;
  const { decodeStepsPerPrefill, decodeStepsPerSubmit } = options;
  const { blockTokens, residualTokens, numerics, gpuAdapter } = options;
  return {
    kvFormat,
    kvBytes,
    maxSequences,
    maxPrefillRows,
    decodeStepsPerPrefill,
    decodeStepsPerSubmit,
    maxContextTokens,
    blockTokens,
    residualTokens,
    numerics,
    gpuAdapter,
  };
}
