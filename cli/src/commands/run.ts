/** `kivimesh run`: one prompt to a running cluster. */
import { text as readAll } from "node:stream/consumers";
import type { Command } from "commander";
import { address, decimal, integer, option } from "../option-values.ts";
import { streamAnswer } from "../report.ts";
import { terminationSignal } from "../shutdown.ts";
import { UsageError } from "../usage-error.ts";
import { type CommandContext, EXIT } from "./command-context.ts";

interface RunOptions {
  readonly address: string;
  readonly model: string;
  readonly system?: string;
  readonly raw?: boolean;
  readonly maxTokens?: number;
  readonly temperature: number;
  readonly topP: number;
  readonly topK: number;
  readonly seed?: number;
  readonly stop: string[];
  readonly worker?: string;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  kivimesh run "What is the capital of France?"
  git log -5 | kivimesh run --system "Summarize these commits." -
  kivimesh run --json --temperature 0.7 --seed 1 "Tell me a joke."`;

export function addRunCommand(program: Command, context: CommandContext): void {
  program
    .command("run")
    .description("send one prompt to a running cluster and stream its answer")
    .argument("<prompt>", "what the user says; - reads it from standard input")
    .addOption(
      option("--address <address>", "host:port of a gateway's gRPC API").argParser(address).default("127.0.0.1:50051"),
    )
    // KIVIMESH_MODEL says what services load, by file or repository: another name than the one that is served.
    .addOption(
      option("-m, --model <name>", "the served model's name (default: the only one)")
        .env("KIVIMESH_SERVED_MODEL")
        .default("", ""),
    )
    .addOption(option("--system <text>", "a system message before it"))
    .addOption(option("--raw", "continue the prompt as it is, without the chat template"))
    .addOption(option("--max-tokens <n>", "most tokens of the answer").argParser(integer(1)))
    .addOption(option("--temperature <t>", "0 is greedy").argParser(decimal(0, 2)).default(0))
    .addOption(
      option("--top-p <p>", "sample from the likeliest tokens of this total probability")
        .argParser(decimal(0, 1))
        .default(1),
    )
    .addOption(option("--top-k <n>", "sample from the n likeliest tokens; 0: all").argParser(integer(0)).default(0))
    .addOption(option("--seed <n>", "same seed, same answer").argParser(integer(0)))
    .addOption(
      option("--stop <text>", "end before this text; may be given up to four times")
        .argParser((text, before: string[]) => [...before, text])
        .default([], ""),
    )
    .addOption(option("--worker <id>", "run on this worker alone"))
    .addOption(option("--json", "the whole answer with its usage, as JSON"))
    .addHelpText("after", EXAMPLES)
    .action((prompt: string, options: RunOptions) => run(prompt, options, context));
}

/** As the gateway allows. */
const MAX_STOPS = 4;

async function run(argument: string, options: RunOptions, context: CommandContext): Promise<void> {
  const { output } = context;
  const prompt = argument === "-" ? await readAll(process.stdin) : argument;
  if (prompt.trim() === "") throw new UsageError("the prompt is empty");
  if (options.stop.length > MAX_STOPS)
    throw new UsageError(`--stop was given ${options.stop.length} times; at most ${MAX_STOPS}`);
  if (options.raw === true && options.system !== undefined)
    throw new UsageError("--raw and --system do not go together");
  const system = options.system === undefined ? [] : [{ role: "system", content: options.system }];
  const termination = terminationSignal(output);
  try {
    const answer = await streamAnswer(
      options.address,
      {
        model: options.model,
        input:
          options.raw === true
            ? { case: "prompt", value: prompt }
            : { case: "chat", value: { messages: [...system, { role: "user", content: prompt }] } },
        sampling: {
          temperature: options.temperature,
          topP: options.topP,
          topK: options.topK,
          ...(options.seed === undefined ? {} : { seed: BigInt(options.seed) }),
        },
        stop: options.stop,
        workerId: options.worker ?? "",
        ...(options.maxTokens === undefined ? {} : { maxTokens: options.maxTokens }),
      },
      options.json === true ? () => {} : output.write,
      termination.signal,
    );
    if (options.json === true) output.json(describe(answer));
    else output.line();
  } catch (error) {
    if (!termination.signal.aborted) throw error;
    output.line();
    context.exitWith(EXIT.interrupted);
  } finally {
    termination.dispose();
  }
}

function describe({ text, usage, ttftSeconds, outputTokensPerSecond }: Awaited<ReturnType<typeof streamAnswer>>) {
  const { gpu = 0, peer = 0, cachestore = 0, computed = 0 } = usage.kivimesh?.promptTokensBySource ?? {};
  return {
    text,
    ttftSeconds,
    outputTokensPerSecond,
    usage: {
      promptTokens: usage.promptTokens,
      completionTokens: usage.completionTokens,
      cachedTokens: usage.cachedTokens,
      worker: usage.kivimesh?.worker,
      kvFormat: usage.kivimesh?.kvFormat,
      promptTokensBySource: { gpu, peer, cachestore, computed },
    },
  };
}
