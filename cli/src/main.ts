/** Parses the command line, runs the command, and turns every outcome into an exit code. */
import { readFileSync } from "node:fs";
import { ClusterError } from "@kivimesh/proto";
import { Command, CommanderError } from "commander";
import { addBenchCommand } from "./commands/bench.ts";
import { addCachestoreCommand } from "./commands/cachestore.ts";
import { type CommandContext, EXIT } from "./commands/command-context.ts";
import { addEvalCommand } from "./commands/eval.ts";
import { addGatewayCommand } from "./commands/gateway.ts";
import { addModelsCommand, addPullCommand } from "./commands/pull.ts";
import { addRunCommand } from "./commands/run.ts";
import { addUpCommand } from "./commands/up.ts";
import { addWorkerCommand } from "./commands/worker.ts";
import { prepareDriverEnvironment } from "./driver-environment.ts";
import { readSwitches } from "./option-values.ts";
import { type Output, terminal } from "./output.ts";
import { SetupError } from "./setup/setup-error.ts";
import { UsageError } from "./usage-error.ts";

const HELP = `
Every option can be given in the environment, under the name that its help says; a flag goes before the environment.

Examples:
  kivimesh pull smollm2-135m-instruct     fetch the default model
  kivimesh up                             run a cluster on this host
  kivimesh run "Hello"                    ask it something`;

/** The whole command line. */
export function commandLine(context: CommandContext): Command {
  const { version } = JSON.parse(readFileSync(new URL("../package.json", import.meta.url), "utf8")) as {
    version: string;
  };
  const program = new Command("kivimesh")
    .description("distributed LLM inference with a shared 2-bit KV cache")
    .version(version)
    .showHelpAfterError("(--help shows what is allowed)")
    .addHelpText("after", HELP)
    .hook("preAction", (_, command) => readSwitches(command, process.env))
    .exitOverride();
  addUpCommand(program, context);
  addGatewayCommand(program, context);
  addWorkerCommand(program, context);
  addCachestoreCommand(program, context);
  addPullCommand(program, context);
  addModelsCommand(program, context);
  addRunCommand(program, context);
  addBenchCommand(program, context);
  addEvalCommand(program, context);
  return program;
}

/** One line for what a user can put right; the stack for a bug. @returns the exit code. */
function report(error: unknown, output: Output): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.ok : EXIT.usage;
  if (error instanceof UsageError) {
    output.notice(error.message);
    return EXIT.usage;
  }
  if (error instanceof ClusterError) {
    output.notice(`${error.message} [${error.code}]`);
    return error.code === "INVALID_ARGUMENT" ? EXIT.usage : EXIT.failure;
  }
  const { code } = error as NodeJS.ErrnoException;
  if (code === "EADDRINUSE") {
    output.notice(`${(error as Error).message}; choose another port (--help names the options)`);
    return EXIT.failure;
  }
  const expected = error instanceof SetupError || error instanceof RangeError || typeof code === "string";
  output.notice(error instanceof Error ? ((expected ? error.message : error.stack) ?? error.message) : String(error));
  return EXIT.failure;
}

/** Runs the command. @returns the process's exit code; the caller exits with it. */
export async function main(argv: readonly string[], output: Output = terminal): Promise<number> {
  let exitCode: number = EXIT.ok;
  const context: CommandContext = {
    output,
    exitWith(code) {
      exitCode = code;
    },
  };
  prepareDriverEnvironment();
  try {
    await commandLine(context).parseAsync(argv, { from: "user" });
    return exitCode;
  } catch (error) {
    return report(error, output);
  }
}
