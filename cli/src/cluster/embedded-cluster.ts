/** The whole cluster in one process: queue, membership, cachestore, workers (each with an engine thread) and gateway. */
import { setTimeout as sleep } from "node:timers/promises";
import { type CachestoreServer, startCachestore } from "@kivimesh/cachestore";
import { type Gateway, type GatewayConfig, startGateway } from "@kivimesh/gateway";
import { ClusterError, type LogLevel } from "@kivimesh/proto";
import { type EngineConfig, startWorker, type WorkerConfig, type WorkerService } from "@kivimesh/worker";
import { Closers } from "./closers.ts";
import { type ClusterSeams, embeddedSeams, redisSeams } from "./cluster-seams.ts";
import { claimFolder, temporaryFolder } from "./data-folder.ts";
import { metricsUrl } from "./metrics-url.ts";

export interface EmbeddedClusterOptions {
  readonly workers: number;
  readonly engine: EngineConfig;
  readonly gateway: GatewayConfig;
  /** BullMQ on this Redis; undefined: on PGlite in this process. */
  readonly redis: string | undefined;
  /** Where the cachestore keeps blocks; undefined: a folder that ends with the cluster. */
  readonly dataDirectory: string | undefined;
  readonly cachestoreMemoryBytes: number;
  readonly cachestoreDiskBytes: number;
  readonly logLevel: LogLevel;
  /** Tells of what takes long. */
  readonly notice: (text: string) => void;
}

export interface EmbeddedCluster {
  readonly httpUrl: string;
  readonly grpcAddress: string;
  readonly workers: readonly WorkerService[];
  /** Of the gateway, each worker and the cachestore. */
  readonly metricsUrls: readonly string[];
  /** Resolves if a worker's GPU or thread is gone. */
  readonly failed: Promise<Error>;
  /** Refuses new requests, lets running ones finish for up to `graceMs`, closes everything. */
  drain(graceMs: number): Promise<void>;
}

/** Workers that run no stream any more have nothing to wait for. */
const WORKER_GRACE_MS = 500;
const READY_TIMEOUT_MS = 60_000;
const READY_POLL_MS = 20;
const LOOPBACK = "127.0.0.1";

async function openCachestore(
  options: EmbeddedClusterOptions,
  seams: ClusterSeams,
  closers: Closers,
): Promise<CachestoreServer> {
  const folder = options.dataDirectory === undefined ? temporaryFolder() : await claimFolder(options.dataDirectory);
  closers.add(async () => folder.release());
  if (folder.usedBy !== undefined) {
    options.notice(
      `${options.dataDirectory} is in use by process ${folder.usedBy}: blocks of this cluster end with it`,
    );
  }
  const cachestore = await startCachestore({
    host: LOOPBACK,
    port: 0,
    metricsPort: 0,
    dataDirectory: folder.path,
    memoryBytes: options.cachestoreMemoryBytes,
    diskBytes: options.cachestoreDiskBytes,
    logLevel: options.logLevel,
    membership: seams.membership,
    id: "cachestore",
  });
  closers.add(() => cachestore.drain(WORKER_GRACE_MS));
  return cachestore;
}

async function openWorkers(
  options: EmbeddedClusterOptions,
  cachestoreAddress: string,
  seams: ClusterSeams,
  closers: Closers,
): Promise<WorkerService[]> {
  const configs = Array.from({ length: options.workers }, (_, index): WorkerConfig => {
    return {
      ...options.engine,
      id: `worker-${index + 1}`,
      host: LOOPBACK,
      port: 0,
      metricsPort: 0,
      cachestoreAddress,
      logLevel: options.logLevel,
    };
  });
  const started = await Promise.allSettled(configs.map((config) => startWorker(config, seams)));
  const workers = started.flatMap((result) => (result.status === "fulfilled" ? [result.value] : []));
  closers.add(async () => {
    await Promise.all(workers.map((worker) => worker.drain(WORKER_GRACE_MS)));
  });
  const failure = started.find((result) => result.status === "rejected");
  if (failure !== undefined) throw failure.reason;
  return workers;
}

/** Waits until the gateway would serve a request. @throws ClusterError NO_WORKER after a time limit. */
async function untilReady(gateway: Gateway): Promise<void> {
  const deadline = Date.now() + READY_TIMEOUT_MS;
  while (!gateway.ready()) {
    if (Date.now() > deadline) {
      throw new ClusterError("NO_WORKER", `the gateway reached no worker in ${READY_TIMEOUT_MS / 1000} s`);
    }
    await sleep(READY_POLL_MS);
  }
}

/**
 * Starts everything and waits until a request would be served.
 * @throws ClusterError, after closing what was started.
 */
export async function startEmbeddedCluster(options: EmbeddedClusterOptions): Promise<EmbeddedCluster> {
  const open = { gateway: new Closers(), services: new Closers(), seams: new Closers() };
  const close = async () => {
    await open.gateway.close();
    await open.services.close();
    await open.seams.close();
  };
  try {
    const seams =
      options.redis === undefined
        ? await embeddedSeams(options.logLevel)
        : await redisSeams(options.redis, options.logLevel);
    open.seams.add(() => seams.close());
    // The gateway's ports come first: a taken one must be told before a model is loaded.
    const gateway = await startGateway(options.gateway, seams);
    open.gateway.add(() => gateway.close());
    const cachestore = await openCachestore(options, seams, open.services);
    const workers = await openWorkers(options, cachestore.address, seams, open.services);
    await untilReady(gateway);
    return {
      httpUrl: gateway.httpUrl,
      grpcAddress: gateway.grpcAddress,
      workers,
      metricsUrls: [
        `${gateway.httpUrl}/metrics`,
        ...workers.flatMap((worker) => worker.metricsUrl ?? []),
        metricsUrl(cachestore),
      ],
      failed: Promise.race(workers.map((worker) => worker.failed)),
      async drain(graceMs) {
        await gateway.drain(graceMs);
        await close();
      },
    };
  } catch (error) {
    await close().catch((failure: unknown) => options.notice(`while closing: ${String(failure)}`));
    throw error;
  }
}
