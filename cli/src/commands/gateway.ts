/** `kivimesh gateway`: the public API, in a process of its own. */
import { startGateway } from "@kivimesh/gateway";
import type { Command } from "commander";
import { redisSeams } from "../cluster/cluster-seams.ts";
import { addListenerOptions, type ListenerOptions, listenerConfig } from "../listener-options.ts";
import { integer, option, port } from "../option-values.ts";
import { closeWithin, serveUntil, startedUnlessEnded, terminationSignal } from "../shutdown.ts";
import type { CommandContext } from "./command-context.ts";

interface GatewayOptions extends ListenerOptions {
  readonly redis: string;
  readonly id?: string;
  readonly httpPort: number;
  readonly grpcPort: number;
  readonly clusterSecret?: string;
  readonly maxRequests?: number;
  readonly maxQueuedJobs?: number;
}

const DRAIN_MS = 30_000;

const EXAMPLES = `
Example:
  kivimesh gateway --redis redis://127.0.0.1:6379 --http-port 8000 --grpc-port 50051`;

export function addGatewayCommand(program: Command, context: CommandContext): void {
  const command = program
    .command("gateway")
    .description("serve the public HTTP and gRPC APIs for the workers that Redis names")
    .addOption(option("--redis <url>", "queue and membership").makeOptionMandatory())
    .addOption(option("--id <id>", "name of this gateway (default: random)").env("KIVIMESH_GATEWAY_ID"))
    .addOption(option("--http-port <port>", "OpenAI-compatible API").argParser(port).default(8000))
    .addOption(option("--grpc-port <port>", "gRPC API").argParser(port).default(50051))
    .addOption(
      option("--cluster-secret <secret>", "key of the tenants' namespaces in block ids, equal at all gateways"),
    )
    .addOption(option("--max-requests <n>", "requests in flight; more are refused with 429").argParser(integer(1)))
    .addOption(
      option("--max-queued-jobs <n>", "jobs that wait in all queues; more are refused with 429").argParser(integer(1)),
    );
  addListenerOptions(command, "info", DRAIN_MS)
    .addHelpText("after", EXAMPLES)
    .action((options: GatewayOptions) => gateway(options, context));
}

async function gateway(options: GatewayOptions, { output }: CommandContext): Promise<void> {
  const termination = terminationSignal(output);
  const seams = await redisSeams(options.redis, options.logLevel);
  const { id, clusterSecret, maxRequests, maxQueuedJobs } = options;
  try {
    const server = await startedUnlessEnded(
      termination,
      startGateway(
        {
          ...(await listenerConfig(options)),
          httpPort: options.httpPort,
          grpcPort: options.grpcPort,
          ...(id === undefined ? {} : { id }),
          ...(clusterSecret === undefined ? {} : { clusterSecret }),
          limits: {
            ...(maxRequests === undefined ? {} : { maxRequests }),
            ...(maxQueuedJobs === undefined ? {} : { maxQueuedJobs }),
          },
        },
        seams,
      ),
    );
    output.notice(`gateway ${server.id}: ${server.httpUrl}, gRPC ${server.grpcAddress}`);
    await serveUntil(termination.signal, server, options.drainTimeoutMs, output);
  } finally {
    await closeWithin(0, seams.close(), output);
    termination.dispose();
  }
}
