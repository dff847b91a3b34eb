/** `kivimesh eval perplexity`: what a KV format costs in quality. */
import { readFile } from "node:fs/promises";
import { Tokenizer } from "@huggingface/tokenizers";
import { KV_FORMAT_NAMES } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import { type LoadedModel, loadModel, openModelRunner, textPerplexity } from "@kivimesh/worker";
import type { Command } from "commander";
import { addModelOptions, type ModelOptions, modelConfig } from "../common-options.ts";
import { integer, list, option } from "../option-values.ts";
import { formatTable } from "../output.ts";
import { countProgress } from "../progress-bar.ts";
import { UsageError } from "../usage-error.ts";
import type { CommandContext } from "./command-context.ts";

/** What one KV format gives. */
interface FormatResult {
  readonly kvFormat: string;
  readonly perplexity: number;
  /** Tokens that were predicted: each window's after its first. */
  readonly tokens: number;
  /** Of a sealed block: scales, zero points and norms included. */
  readonly bitsPerElement: number;
}

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
    .addOption(option("--text <file>", "UTF-8 text").makeOptionMandatory())
    .addOption(
      option("--kv-format <formats>", `one or more of ${KV_FORMAT_NAMES.join(", ")}, parted by commas`)
        .argParser(list)
        .default(["f16", "kivi2r"], "f16,kivi2r"),
    )
    .addOption(option("--context <n>", "tokens of a window").argParser(integer(2)).default(1536))
    .addOption(option("--json", "as JSON"))
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

async function evaluateFormat(
  model: LoadedModel,
  kvFormat: string,
  tokens: Uint32Array,
  contextTokens: number,
): Promise<FormatResult> {
  const runner = await openModelRunner({ model, kvFormat, maxSequences: 1, maxContextTokens: contextTokens });
  const total = Math.floor(tokens.length / contextTokens) * contextTokens;
  const bar = countProgress(`${kvFormat}: tokens`, total);
  try {
    const result = await textPerplexity(runner, tokens, { contextTokens, onProgress: (done) => bar.update(done) });
    return { kvFormat, perplexity: result.perplexity, tokens: result.tokens, bitsPerElement: runner.kv.bitsPerElement };
  } finally {
    bar.stop();
    await runner.close();
  }
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
  const results: FormatResult[] = [];
  try {
    const tokens = tokenize(model, text);
    for (const kvFormat of options.kvFormat) {
      results.push(await evaluateFormat(model, kvFormat, tokens, options.context));
    }
  } finally {
    model.close();
  }
  if (options.json === true) output.json({ model: modelName ?? model.name, results });
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
