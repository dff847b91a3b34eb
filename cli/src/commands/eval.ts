/** `kivimesh eval perplexity`: what a KV format costs in quality. */
import { readFile } from "node:fs/promises";
import { Tokenizer } from "@huggingface/tokenizers";
import { KV_FORMAT_NAMES } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import { type LoadedModel, loadModel, openModelRunner } from "@kivimesh/worker";
import type { Command } from "commander";
import { addModelOptions, type ModelOptions, modelConfig } from "../common-options.ts";
import { integer, list, option } from "../option-values.ts";
import { formatTable } from "../output.ts";
import { type PerplexityResult, perplexity } from "../perplexity.ts";
import { UsageError } from "../usage-error.ts";
import type { CommandContext } from "./command-context.ts";

interface EvalOptions extends ModelOptions {
  readonly text: string;
  readonly kvFormat: string[];
  readonly context: number;
  readonly json?: boolean;
}

const EXAMPLES = `
Example:
  kivimesh eval perplexity --text book.txt --kv-format f16,kivi4,kivi2,kivi2r --context 1536 --json`;

export function addEvalCommand(program: Command, context: CommandContext): void {
  const evaluate = program.command("eval").description("measure quality");
  addModelOptions(evaluate.command("perplexity"))
    .description("perplexity of a text for each KV format, in windows that do not overlap")
    .requiredOption("--text <file>", "UTF-8 text")
    .addOption(
      option("--kv-format <formats>", `one or more of ${KV_FORMAT_NAMES.join(", ")}, parted by commas`)
        .argParser(list)
        .default(["f16", "kivi2r"], "f16,kivi2r"),
    )
    .option("--context <n>", "tokens of a window", integer(2), 1536)
    .option("--json", "as JSON")
    .addHelpText("after", EXAMPLES)
    .action((options: EvalOptions) => evalPerplexity(options, context));
}

async function readText(path: string): Promise<string> {
  try {
    return await readFile(path, "utf8");
  } catch (error) {
    throw new ClusterError("INVALID_ARGUMENT", `cannot read ${path}: ${(error as Error).message}`, { cause: error });
  }
}

/** Token ids of the text, without special tokens before or after it. */
function tokenize(model: LoadedModel, text: string): Uint32Array {
  const { tokenizerJson, tokenizerConfigJson } = model.tokenizer;
  const parts = { normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null, added_tokens: [] };
  const config = tokenizerConfigJson === "" ? {} : JSON.parse(tokenizerConfigJson);
  const tokenizer = new Tokenizer({ ...parts, ...JSON.parse(tokenizerJson) }, config);
  return Uint32Array.from(tokenizer.encode(text, { add_special_tokens: false }).ids);
}

async function evalPerplexity(options: EvalOptions, { output }: CommandContext): Promise<void> {
  const unknown = options.kvFormat.find((name) => !KV_FORMAT_NAMES.includes(name));
  if (unknown !== undefined) throw new UsageError(`unknown KV format ${unknown}; known: ${KV_FORMAT_NAMES.join(", ")}`);
  const text = await readText(options.text);
  const { modelPath, dummyArchitecture, modelName } = await modelConfig(options);
  const source =
    modelPath === undefined
      ? { dummy: dummyArchitecture ?? "" }
      : { path: modelPath, ...(modelName === undefined ? {} : { name: modelName }) };
  const model = await loadModel(source);
  const results: PerplexityResult[] = [];
  try {
    const tokens = tokenize(model, text);
    for (const kvFormat of options.kvFormat) {
      const runner = await openModelRunner({ model, kvFormat, maxSequences: 1, maxContextTokens: options.context });
      try {
        const onWindow = (done: number, total: number) => output.notice(`${kvFormat}: window ${done} of ${total}`);
        results.push(await perplexity(runner, tokens, options.context, onWindow));
      } finally {
        await runner.close();
      }
    }
  } finally {
    model.close();
  }
  if (options.json === true) output.json({ model: model.name, results });
  else {
    const rows = results.map((result) => [
      result.kvFormat,
      Number(result.perplexity.toFixed(4)),
      result.tokens,
      Number(result.bitsPerElement.toFixed(2)),
    ]);
    output.line(formatTable(["KV format", "perplexity", "tokens", "bits per element"], rows));
  }
}
