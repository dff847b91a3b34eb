/** `kivimesh cachestore`: keeps sealed KV blocks, in a process of its own. */
import { join } from "node:path";
import { startCachestore } from "@kivimesh/cachestore";
import type { Command } from "commander";
import { cacheFolder } from "../cache-folder.ts";
import { redisSeams } from "../cluster/cluster-seams.ts";
import { metricsUrl } from "../cluster/metrics-url.ts";
import { addListenerOptions, type ListenerOptions, listenerConfig } from "../listener-options.ts";
import { address, bytes, option, port } from "../option-values.ts";
import { closeWithin, serveUntil, startedUnlessEnded, terminationSignal } from "../shutdown.ts";
import type { CommandContext } from "./command-context.ts";

interface CachestoreOptions extends ListenerOptions {
  readonly port: number;
  readonly dataDirectory?: string;
  readonly memoryBytes: number;
  readonly diskBytes: number;
  readonly metricsPort: number;
  readonly redis?: string;
  readonly id?: string;
  readonly advertisedAddress?: string;
}

const DRAIN_MS = 5_000;
const DEFAULT_MEMORY_BYTES = 2 ** 30;
const DEFAULT_DISK_BYTES = 16 * 2 ** 30;

const EXAMPLES = `
Examples:
  kivimesh cachestore --port 7000 --data-directory /var/lib/kivimesh
  kivimesh cachestore --port 7000 --redis redis://127.0.0.1:6379 --memory-bytes 8GiB --disk-bytes 200GiB`;

export function addCachestoreCommand(program: Command, context: CommandContext): void {
  const command = program
    .command("cachestore")
    .description("keep sealed KV blocks in memory and on disk for all workers")
    .addOption(
      option("--port <port>", "gRPC port; 0: any free one")
        .env("KIVIMESH_CACHESTORE_PORT")
        .argParser(port)
        .default(7000),
    )
    .addOption(option("--data-directory <folder>", "disk tier (default: cachestore in the cache folder)"))
    .addOption(
      option("--memory-bytes <bytes>", "limit of the memory tier")
        .argParser(bytes)
        .default(DEFAULT_MEMORY_BYTES, "1GiB"),
    )
    .addOption(
      option("--disk-bytes <bytes>", "limit of the disk tier's file; blocks take at most half of it")
        .argParser(bytes)
        .default(DEFAULT_DISK_BYTES, "16GiB"),
    )
    .addOption(
      option("--metrics-port <port>", "/metrics, /healthz and /readyz; 0: any free one").argParser(port).default(0),
    )
    .addOption(
      option(
        "--advertised-address <address>",
        "host:port under which workers reach it, where that is another",
      ).argParser(address),
    )
    .addOption(option("--redis <url>", "announce this cachestore there, so that workers find it"))
    .addOption(
      option("--id <id>", "name in the membership and in metrics (default: made up at each start)").env(
        "KIVIMESH_CACHESTORE_ID",
      ),
    );
  addListenerOptions(command, "info", DRAIN_MS)
    .addHelpText("after", EXAMPLES)
    .action((options: CachestoreOptions) => cachestore(options, context));
}

async function cachestore(options: CachestoreOptions, { output }: CommandContext): Promise<void> {
  const termination = terminationSignal(output);
  const seams = options.redis === undefined ? undefined : await redisSeams(options.redis, options.logLevel);
  const { id, advertisedAddress } = options;
  try {
    const service = await startedUnlessEnded(
      termination,
      startCachestore({
        ...(await listenerConfig(options)),
        logLevel: options.logLevel,
        port: options.port,
        dataDirectory: options.dataDirectory ?? join(cacheFolder(), "cachestore"),
        memoryBytes: options.memoryBytes,
        diskBytes: options.diskBytes,
        metricsPort: options.metricsPort,
        ...(id === undefined ? {} : { id }),
        ...(advertisedAddress === undefined ? {} : { advertisedAddress }),
        ...(seams === undefined ? {} : { membership: seams.membership }),
      }),
    );
    output.notice(`cachestore ${service.id}: gRPC ${service.address}, metrics ${metricsUrl(service)}`);
    await serveUntil(termination.signal, service, options.drainTimeoutMs, output);
  } finally {
    if (seams !== undefined) await closeWithin(0, seams.close(), output);
    termination.dispose();
  }
}
