/** `kivimesh up`: the cluster on one host. */
import { access, constants, writeFile } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import type { Command } from "commander";
import { cacheFolder } from "../cache-folder.ts";
import { type EmbeddedCluster, startEmbeddedCluster } from "../cluster/embedded-cluster.ts";
import {
  addEngineOptions,
  addModelOptions,
  type EngineOptions,
  engineConfig,
  type ModelOptions,
  modelConfig,
} from "../common-options.ts";
import { addListenerOptions, type ListenerOptions, listenerConfig } from "../listener-options.ts";
import { bytes, integer, option, port } from "../option-values.ts";
import { formatReport, type GenerateInit, promptReport, streamAnswer } from "../report.ts";
import { closeWithin, serveUntil, startedUnlessEnded, terminationSignal } from "../shutdown.ts";
import { UsageError } from "../usage-error.ts";
import type { CommandContext } from "./command-context.ts";

interface UpOptions extends ModelOptions, EngineOptions, ListenerOptions {
  readonly workers: number;
  readonly httpPort?: number;
  readonly grpcPort?: number;
  readonly redis?: string;
  readonly dataDirectory?: string;
  readonly memoryBytes: number;
  readonly diskBytes: number;
  readonly clusterSecret?: string;
  readonly prompt?: string;
  readonly maxTokens: number;
  readonly once?: boolean;
  readonly report?: string;
}

const DEFAULT_HTTP_PORT = 8000;
const DEFAULT_GRPC_PORT = 50051;
const DEFAULT_MEMORY_BYTES = 256 * 2 ** 20;
const DEFAULT_DISK_BYTES = 4 * 2 ** 30;
/** Ctrl-C in the middle of a stream must end in under five seconds, closing included. */
const DRAIN_MS = 2_000;

const EXAMPLES = `
Examples:
  kivimesh up                                        two workers, http://127.0.0.1:8000/v1
  kivimesh up --workers 1 --kv-format kivi4          one worker, 4-bit KV blocks
  kivimesh up --once --prompt "What is a prime?"     one answer, a report, and out
  kivimesh up --redis redis://127.0.0.1:6379         jobs in Redis instead of PGlite`;

export function addUpCommand(program: Command, context: CommandContext): void {
  const command = program.command("up").description("run the whole cluster on this host: gateway, workers, cachestore");
  addModelOptions(command)
    .addOption(option("--workers <n>", "workers, each with its own engine").argParser(integer(1, 64)).default(2))
    .addOption(
      option(
        "--http-port <port>",
        `OpenAI-compatible API (default: ${DEFAULT_HTTP_PORT}; with --once any free port)`,
      ).argParser(port),
    )
    .addOption(
      option("--grpc-port <port>", `gRPC API (default: ${DEFAULT_GRPC_PORT}; with --once any free port)`).argParser(
        port,
      ),
    )
    .addOption(option("--redis <url>", "queue and membership on this Redis (default: PGlite in this process)"))
    .addOption(
      option("--data-directory <folder>", "the cachestore's disk tier (default: cachestore in the cache folder)"),
    )
    .addOption(
      option("--memory-bytes <bytes>", "limit of the cachestore's memory tier")
        .argParser(bytes)
        .default(DEFAULT_MEMORY_BYTES, "256MiB"),
    )
    .addOption(
      option("--disk-bytes <bytes>", "limit of its disk tier's file; blocks take at most half")
        .argParser(bytes)
        .default(DEFAULT_DISK_BYTES, "4GiB"),
    )
    .addOption(option("--cluster-secret <secret>", "key of the tenants' namespaces in block ids"));
  addListenerOptions(addEngineOptions(command), "warn", DRAIN_MS)
    .addOption(option("--prompt <text>", "a first prompt: its answer is streamed here, then a report"))
    .addOption(option("--max-tokens <n>", "of the first prompt's answer").argParser(integer(1)).default(200))
    .addOption(option("--once", "end after the first prompt's report"))
    .addOption(option("--report <file>", "write the report there as JSON"))
    .addHelpText("after", EXAMPLES)
    .action((options: UpOptions) => up(options, context));
}

/** Streams the first prompt's answer and tells the report. */
async function firstPrompt(
  cluster: EmbeddedCluster,
  prompt: string,
  options: UpOptions,
  context: CommandContext,
  signal: AbortSignal,
) {
  const { output } = context;
  const model = cluster.workers[0]?.model;
  const input: GenerateInit["input"] =
    model?.chatTemplate === ""
      ? { case: "prompt", value: prompt }
      : { case: "chat", value: { messages: [{ role: "user", content: prompt }] } };
  output.line(`> ${prompt}\n`);
  const request: GenerateInit = { input, sampling: { temperature: 0 }, maxTokens: options.maxTokens };
  const answer = await streamAnswer(cluster.grpcAddress, request, output.write, signal);
  const report = promptReport(answer, { model: model?.name ?? "", device: model?.device ?? "", prompt });
  output.line(`\n\n${formatReport(report)}\n`);
  if (options.report !== undefined) await writeFile(options.report, `${JSON.stringify(report, undefined, 2)}\n`);
}

/** The first prompt, ended by the signal without an error. */
async function firstPromptUntil(
  cluster: EmbeddedCluster,
  options: UpOptions,
  context: CommandContext,
  signal: AbortSignal,
): Promise<void> {
  if (options.prompt === undefined) return;
  try {
    await firstPrompt(cluster, options.prompt, options, context, signal);
  } catch (error) {
    if (!signal.aborted) throw error;
    context.output.line();
  }
}

async function startCluster(options: UpOptions, context: CommandContext): Promise<EmbeddedCluster> {
  const once = options.once === true;
  const { dataDirectory = join(cacheFolder(), "cachestore"), clusterSecret } = options;
  return startEmbeddedCluster({
    workers: options.workers,
    engine: { ...engineConfig(options), ...(await modelConfig(options)) },
    gateway: {
      ...(await listenerConfig(options)),
      httpPort: options.httpPort ?? (once ? 0 : DEFAULT_HTTP_PORT),
      grpcPort: options.grpcPort ?? (once ? 0 : DEFAULT_GRPC_PORT),
      ...(clusterSecret === undefined ? {} : { clusterSecret }),
    },
    redis: options.redis,
    dataDirectory: once && options.dataDirectory === undefined ? undefined : dataDirectory,
    cachestoreMemoryBytes: options.memoryBytes,
    cachestoreDiskBytes: options.diskBytes,
    logLevel: options.logLevel,
    notice: context.output.notice,
  });
}

/** Before a cluster is started for it. @throws UsageError where the report could not be written. */
async function checkWritable(file: string): Promise<void> {
  try {
    await access(dirname(resolve(file)), constants.W_OK);
  } catch {
    throw new UsageError(`--report: the folder ${dirname(resolve(file))} does not exist or cannot be written`);
  }
}

async function up(options: UpOptions, context: CommandContext): Promise<void> {
  const { output } = context;
  if (options.once === true && options.prompt === undefined) {
    throw new UsageError("--once needs a --prompt");
  }
  if (options.prompt?.trim() === "") throw new UsageError("--prompt is empty");
  if (options.report !== undefined) await checkWritable(options.report);
  const termination = terminationSignal(output);
  const started = Date.now();
  output.notice(`starting ${options.workers} worker${options.workers === 1 ? "" : "s"}, cachestore and gateway ...`);
  const cluster = await startedUnlessEnded(termination, startCluster(options, context));
  output.notice(`ready after ${((Date.now() - started) / 1000).toFixed(1)} s on ${cluster.workers[0]?.model.device}`);
  try {
    await firstPromptUntil(cluster, options, context, termination.signal);
  } catch (error) {
    await closeWithin(0, cluster.drain(0), output);
    throw error;
  }
  if (options.once === true) {
    await closeWithin(0, cluster.drain(0), output);
  } else {
    if (!termination.signal.aborted) {
      output.line(`HTTP     ${cluster.httpUrl}/v1\ngRPC     ${cluster.grpcAddress}`);
      output.line(`metrics  ${cluster.metricsUrls.join(" ")}\nCtrl-C ends the cluster.`);
    }
    await serveUntil(termination.signal, cluster, options.drainTimeoutMs, output);
  }
  termination.dispose();
}
