import {
  type Announcement,
  createLogger,
  createRegistry,
  type GrpcServer,
  type Logger,
  type MetricsServer,
  serveGrpc,
  serveMetrics,
} from "@kivimesh/proto";
import type { Registry } from "prom-client";
import type { BlockStore, StoreStats } from "./block-store.ts";
import { cachestoreService } from "./cachestore-service.ts";
import { type CachestoreConfig, completeConfig } from "./config.ts";
import { instrumentedStore } from "./instrumented-store.ts";
import { openTieredStore } from "./tiered-store.ts";

export interface CachestoreServer {
  readonly id: string;
  /** `host:port` of the gRPC listener. */
  readonly address: string;
  /** Of the HTTP listener with /metrics, if there is one. */
  readonly metricsUrl?: string;
  stats(): StoreStats;
  /** What is inconsistent inside; empty when all is well. */
  checkIntegrity(options?: { payloads?: boolean }): Promise<string[]>;
  /** Leaves membership, lets running calls end within `graceMs`, and closes the files. */
  drain(graceMs: number): Promise<void>;
}

/** Starts a cachestore: opens its blocks, serves gRPC, announces itself. Resolves when it is ready. */
export async function startCachestore(config: CachestoreConfig): Promise<CachestoreServer> {
  const settings = completeConfig(config);
  const logger = settings.logger ?? createLogger("cachestore", settings.logLevel);
  const registry = createRegistry();
  const store = instrumentedStore(
    await openTieredStore({
      directory: settings.dataDirectory,
      memoryBytes: settings.memoryBytes,
      diskBytes: settings.diskBytes,
    }),
    registry,
  );
  const opened: { rpc?: GrpcServer; metrics?: MetricsServer; announcement?: Announcement } = {};
  const close = async (graceMs: number) => {
    await opened.announcement?.withdraw();
    await opened.rpc?.shutdown(graceMs);
    await store.close();
    await opened.metrics?.close();
  };
  try {
    opened.rpc = await serveRpc(store, settings, logger);
    if (settings.metricsPort !== undefined) {
      opened.metrics = await serveStoreMetrics(settings, registry, () => opened.announcement !== undefined);
    }
    const address = settings.advertisedAddress ?? opened.rpc.address;
    const member = { id: settings.id, role: "cachestore" as const, address };
    opened.announcement = (await settings.membership?.announce(member)) ?? { withdraw: async () => {} };
    opened.rpc.setServing(true);
  } catch (error) {
    await close(0);
    throw error;
  }
  const { blocks, diskBytes } = store.stats();
  logger.info({ id: settings.id, address: opened.rpc.address, blocks, diskBytes }, "cachestore is ready");
  let closing: Promise<void> | undefined;
  return {
    id: settings.id,
    address: opened.rpc.address,
    ...(opened.metrics && { metricsUrl: opened.metrics.url }),
    stats: () => store.stats(),
    checkIntegrity: (options) => store.checkIntegrity(options),
    drain(graceMs) {
      closing ??= close(graceMs);
      return closing;
    },
  };
}

type Settings = ReturnType<typeof completeConfig>;

function serveRpc(store: BlockStore, settings: Settings, logger: Logger): Promise<GrpcServer> {
  return serveGrpc({
    host: settings.host,
    port: settings.port,
    services: [cachestoreService(store)],
    onInternalError: (error, method) => logger.error({ err: error, method }, "call failed"),
    ...(settings.allowInsecure !== undefined && { allowInsecure: settings.allowInsecure }),
    ...(settings.tls && { tls: settings.tls }),
  });
}

function serveStoreMetrics(settings: Settings, registry: Registry, isReady: () => boolean): Promise<MetricsServer> {
  return serveMetrics({ host: settings.host, port: settings.metricsPort ?? 0, registry, isReady });
}
