/** `kivimesh worker`: one engine on one GPU, in a process of its own. */
import { hostname } from "node:os";
import { startWorker } from "@kivimesh/worker";
import type { Command } from "commander";
import { redisSeams } from "../cluster/cluster-seams.ts";
import {
  addEngineOptions,
  addModelOptions,
  type EngineOptions,
  engineConfig,
  type ModelOptions,
  modelConfig,
} from "../common-options.ts";
import { addListenerOptions, type ListenerOptions, listenerConfig } from "../listener-options.ts";
import { address, option, port } from "../option-values.ts";
import { closeWithin, serveUntil, startedUnlessEnded, terminationSignal } from "../shutdown.ts";
import type { CommandContext } from "./command-context.ts";

interface WorkerOptions extends ModelOptions, EngineOptions, ListenerOptions {
  readonly redis: string;
  readonly id: string;
  readonly port: number;
  readonly metricsPort: number;
  readonly cachestore?: string;
}

const DRAIN_MS = 30_000;

const EXAMPLES = `
Examples:
  kivimesh worker --redis redis://127.0.0.1:6379 --id a
  kivimesh worker --redis redis://127.0.0.1:6379 --id b --cachestore 127.0.0.1:7000 --metrics-port 9101`;

export function addWorkerCommand(program: Command, context: CommandContext): void {
  const command = program
    .command("worker")
    .description("run prefill and decode on this machine's GPU for the gateways of a Redis")
    .addOption(option("--redis <url>", "queue and membership").makeOptionMandatory())
    .addOption(
      option("--id <id>", "name of this worker, unique in the cluster")
        .env("KIVIMESH_WORKER_ID")
        .default(`${hostname()}-${process.pid}`, "host name and process id"),
    )
    .addOption(
      option("--port <port>", "gRPC port for gateways; 0: any free one")
        .env("KIVIMESH_WORKER_PORT")
        .argParser(port)
        .default(0),
    )
    .addOption(
      option("--metrics-port <port>", "/metrics, /healthz and /readyz; 0: any free one").argParser(port).default(0),
    )
    .addOption(
      option("--cachestore <address>", "host:port (default: the one that Redis names, if any)").argParser(address),
    );
  addModelOptions(command);
  addListenerOptions(addEngineOptions(command), "info", DRAIN_MS)
    .addHelpText("after", EXAMPLES)
    .action((options: WorkerOptions) => worker(options, context));
}

async function worker(options: WorkerOptions, { output }: CommandContext): Promise<void> {
  const termination = terminationSignal(output);
  const model = await modelConfig(options);
  const seams = await redisSeams(options.redis, options.logLevel);
  try {
    const service = await startedUnlessEnded(
      termination,
      startWorker(
        {
          ...engineConfig(options),
          ...model,
          ...(await listenerConfig(options)),
          id: options.id,
          port: options.port,
          cachestoreAddress: options.cachestore,
          metricsPort: options.metricsPort,
        },
        seams,
      ),
    );
    const { id, address: grpc, metricsUrl = "" } = service;
    output.notice(
      `worker ${id}: ${service.model.name} on ${service.model.device}, gRPC ${grpc}, metrics ${metricsUrl}`,
    );
    await serveUntil(termination.signal, service, options.drainTimeoutMs, output);
  } finally {
    await closeWithin(0, seams.close(), output);
    termination.dispose();
  }
}
