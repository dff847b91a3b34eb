import { randomUUID } from "node:crypto";
import {
  assertSecureListener,
  ClusterError,
  createLogger,
  hostAndPort,
  type JobQueues,
  type Logger,
  type Membership,
  serveGrpc,
} from "@kivimesh/proto";
import { type GatewayConfig, gatewayConfig, type ResolvedGatewayConfig } from "./config.ts";
import { Coordinator } from "./coordinator.ts";
import { dashboardState, readDashboardPage } from "./dashboard.ts";
import { httpServer } from "./http-server.ts";
import { inferenceService } from "./inference-service.ts";
import { GatewayMetrics } from "./metrics.ts";
import { QueueJanitor } from "./queue-janitor.ts";
import { QueueMonitor } from "./queue-monitor.ts";
import { TextGenerator } from "./text-generation.ts";
import { WorkerRegistry } from "./worker-registry.ts";

/** How often readiness is told to gRPC health checks. */
const healthEveryMs = 250;
/** What running calls get to send their last words after the coordinator has ended their requests. */
const closeGraceMs = 1_000;

/** What a gateway shares with the rest of the cluster. The caller owns both and closes them after the gateway. */
export interface GatewaySeams {
  jobQueues: JobQueues;
  membership: Membership;
}

/** A running gateway. */
export interface Gateway {
  readonly id: string;
  /** `http://host:port` or `https://host:port`. */
  readonly httpUrl: string;
  /** `host:port`. */
  readonly grpcAddress: string;
  /** Whether a request would be served now. */
  ready(): boolean;
  /** Refuses new requests, lets running ones finish for at most `graceMs`, ends the rest with an error, then closes. */
  drain(graceMs: number): Promise<void>;
  /** Ends everything at once. */
  close(): Promise<void>;
}

/**
 * Starts the HTTP and gRPC listeners and follows the workers that `membership` names. Throws INVALID_ARGUMENT for a
 * configuration that is not allowed (a listener in the clear that others can reach, for one) or a port that is taken.
 */
export async function startGateway(config: GatewayConfig, seams: GatewaySeams): Promise<Gateway> {
  const resolved = gatewayConfig(config, randomUUID);
  assertSecureListener({
    host: resolved.host,
    allowInsecure: resolved.allowInsecure,
    ...(resolved.tls === undefined ? {} : { tls: resolved.tls }),
  });
  const log = createLogger("gateway", resolved.logLevel);
  const parts = composeGateway(resolved, seams, log);
  return listen(resolved, parts, log);
}

interface GatewayParts {
  readonly metrics: GatewayMetrics;
  readonly registry: WorkerRegistry;
  readonly monitor: QueueMonitor;
  readonly janitor: QueueJanitor;
  readonly coordinator: Coordinator;
  readonly generator: TextGenerator;
}

function composeGateway(config: ResolvedGatewayConfig, seams: GatewaySeams, log: Logger): GatewayParts {
  const { id: gatewayId, limits, tls } = config;
  const { jobQueues, membership } = seams;
  const metrics = new GatewayMetrics();
  const registry = new WorkerRegistry({
    gatewayId,
    tls,
    limits,
    log,
    membership,
    // Registry and coordinator know each other; events come only after `start`.
    events: {
      joined: () => undefined,
      tokens: (workerId, message) => coordinator.tokens(workerId, message),
      finished: (workerId, message) => coordinator.finished(workerId, message),
      lost: (workerId, reason) => coordinator.lost(workerId, reason),
    },
  });
  const liveIds = () => registry.live().map((worker) => worker.id);
  const monitor = new QueueMonitor(jobQueues, liveIds, limits.queueTimeoutMs, log);
  const connectedIds = () => registry.connected().map((worker) => worker.id);
  const janitor = new QueueJanitor({ jobQueues, membership, connectedIds, graceMs: limits.queueGraceMs, log });
  const coordinator = new Coordinator({ gatewayId, jobQueues, registry, monitor, limits, log, observer: metrics });
  const generator = new TextGenerator({
    coordinator,
    catalogue: registry.catalogue,
    clusterSecret: config.clusterSecret,
    maxCompletionTokens: limits.maxCompletionTokens,
  });
  metrics.watch({ registry, coordinator, monitor }, true);
  return { metrics, registry, monitor, janitor, coordinator, generator };
}

async function listen(config: ResolvedGatewayConfig, parts: GatewayParts, log: Logger): Promise<Gateway> {
  const { metrics, registry, monitor, janitor, coordinator, generator } = parts;
  const http = httpServer({
    config,
    generator,
    log,
    models: () => registry.servedModels(),
    model: (name) => registry.catalogue.get(name),
    notReady: () => notReady(parts),
    metrics: async () => ({ contentType: metrics.registry.contentType, text: await metrics.registry.metrics() }),
    dashboardPage: readDashboardPage(),
    dashboardState: async () => dashboardState(registry, coordinator, monitor, metrics.totals()),
  });
  const service = inferenceService(
    generator,
    () => registry.servedModels(),
    (requestId) => coordinator.cancelById(requestId),
  );
  const listening = serveGrpc({
    host: config.host,
    port: config.grpcPort,
    services: [service],
    allowInsecure: config.allowInsecure,
    onInternalError: (error, method) => log.error({ err: error, method }, "internal error"),
    ...(config.tls === undefined ? {} : { tls: config.tls }),
  });
  const grpc = await listening.catch((error: unknown) => cannotListen("gRPC", config.host, config.grpcPort, error));
  try {
    await http.fastify.listen({ host: config.host, port: config.httpPort });
  } catch (error) {
    await grpc.shutdown(0);
    cannotListen("HTTP", config.host, config.httpPort, error);
  }
  registry.start();
  await monitor.start();
  janitor.start();
  const health = setInterval(() => grpc.setServing(notReady(parts) === undefined), healthEveryMs);
  const drain = async (graceMs: number) => {
    const ended = coordinator.drain(graceMs);
    grpc.setServing(false);
    await ended;
    clearInterval(health);
    await Promise.all([http.close(closeGraceMs), grpc.shutdown(closeGraceMs)]);
    monitor.close();
    await janitor.close();
    registry.close();
    log.info("gateway closed");
  };
  const address = http.fastify.server.address();
  const httpUrl = `${config.tls === undefined ? "http" : "https"}://${hostAndPort(config.host, typeof address === "object" ? (address?.port ?? 0) : config.httpPort)}`;
  log.info({ id: config.id, http: httpUrl, grpc: grpc.address }, "gateway listens");
  let closing: Promise<void> | undefined;
  return {
    id: config.id,
    httpUrl,
    grpcAddress: grpc.address,
    ready: () => notReady(parts) === undefined,
    drain: (graceMs) => (closing ??= drain(graceMs)),
    close: () => (closing ??= drain(0)),
  };
}

function cannotListen(what: string, host: string, port: number, error: unknown): never {
  const reason = error instanceof Error ? error.message : String(error);
  const why = /EADDRINUSE|address already in use/i.test(reason) ? "the port is taken; choose another" : reason;
  throw new ClusterError("INVALID_ARGUMENT", `cannot listen for ${what} on ${hostAndPort(host, port)}: ${why}`, {
    parameter: `${what.toLowerCase()}Port`,
    cause: error,
  });
}

/** Why a request would not be served now. */
function notReady({ coordinator, monitor, registry }: GatewayParts): string | undefined {
  if (coordinator.draining) {
    return "the gateway is shutting down";
  }
  if (!monitor.healthy) {
    return "the job queue does not answer";
  }
  return registry.live().length === 0 ? "no worker is connected" : undefined;
}
