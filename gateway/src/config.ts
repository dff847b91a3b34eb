import { ClusterError, isLoopback, type LogLevel, type TlsFiles } from "@kivimesh/proto";
import { z } from "zod";

/** Secret of clusters that never leave loopback; any other listener has to be given one. */
const loopbackClusterSecret = "kivimesh-local";

/** Every bound of the gateway. No queue, buffer, retry or wait is without one. */
export interface GatewayLimits {
  /** Requests in flight at this gateway, waiting or running. */
  maxRequests: number;
  /** Jobs that wait in the queues of all live workers together, whoever put them there. */
  maxQueuedJobs: number;
  /** Completion tokens of one request; also the default where the client names none. */
  maxCompletionTokens: number;
  /** Bytes of one HTTP body. */
  maxBodyBytes: number;
  /** Attempts at one request, the first included. */
  maxAttempts: number;
  /** How long a request that lost its worker waits for another one. */
  workerWaitMs: number;
  /** Whole request, queue included. */
  requestTimeoutMs: number;
  /** How long the queue may take to accept a job. */
  queueTimeoutMs: number;
  /** How long a worker has to be away before its queue, and the prompts in it, are removed. */
  queueGraceMs: number;
  /** How long a stopped attempt may take to report its usage. */
  abortWaitMs: number;
  /** Silence on an event stream after which its SSE client gets a comment. */
  ssePingMs: number;
  /** How often the connection to a worker is probed, and how long an answer may take: then the worker is lost. */
  keepaliveMs: number;
  keepaliveTimeoutMs: number;
}

export const defaultGatewayLimits: GatewayLimits = {
  maxRequests: 256,
  maxQueuedJobs: 1024,
  maxCompletionTokens: 4096,
  maxBodyBytes: 8 * 1024 * 1024,
  maxAttempts: 4,
  workerWaitMs: 10_000,
  requestTimeoutMs: 600_000,
  queueTimeoutMs: 3_000,
  queueGraceMs: 60_000,
  abortWaitMs: 5_000,
  ssePingMs: 15_000,
  keepaliveMs: 1_000,
  keepaliveTimeoutMs: 3_000,
};

/** How a gateway runs. Only `host` and the ports are commonly set; see `gatewayConfig` for the defaults. */
export interface GatewayConfig {
  /** Names this gateway to workers; a restarted gateway must have another. Default: random. */
  id?: string;
  /** Of both listeners. Default 127.0.0.1. */
  host?: string;
  /** 0: any free port. Default 0. */
  httpPort?: number;
  grpcPort?: number;
  /** For both listeners and for calls to workers. */
  tls?: TlsFiles;
  allowInsecure?: boolean;
  /** Key of the tenant namespaces in block ids: equal at all gateways, for as long as blocks are to be found again. */
  clusterSecret?: string;
  /** pino level. Default "info". */
  logLevel?: LogLevel;
  limits?: Partial<GatewayLimits>;
}

/** A checked configuration with every default filled in. */
export interface ResolvedGatewayConfig {
  readonly id: string;
  readonly host: string;
  readonly httpPort: number;
  readonly grpcPort: number;
  readonly tls: TlsFiles | undefined;
  readonly allowInsecure: boolean;
  readonly clusterSecret: string;
  readonly logLevel: LogLevel;
  readonly limits: GatewayLimits;
}

const positive = z.number().int().min(1);
const logLevel = z.enum(["trace", "debug", "info", "warn", "error", "fatal", "silent"]);
const port = z.number().int().min(0).max(65_535);
const configSchema = z.object({
  host: z.string().min(1),
  httpPort: port,
  grpcPort: port,
  clusterSecret: z.string().min(8, "must have at least 8 characters"),
  logLevel,
  limits: z.record(z.string(), positive),
});

/** Fills in defaults and checks. Throws INVALID_ARGUMENT that names the field. */
export function gatewayConfig(config: GatewayConfig, randomId: () => string): ResolvedGatewayConfig {
  const host = config.host ?? "127.0.0.1";
  if (config.clusterSecret === undefined && !isLoopback(host)) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `a gateway on ${host} needs a cluster secret (--cluster-secret or KIVIMESH_CLUSTER_SECRET), equal at all gateways`,
      { parameter: "clusterSecret" },
    );
  }
  const resolved: ResolvedGatewayConfig = Object.freeze({
    id: config.id ?? `gateway-${randomId()}`,
    host,
    httpPort: config.httpPort ?? 0,
    grpcPort: config.grpcPort ?? 0,
    tls: config.tls,
    allowInsecure: config.allowInsecure ?? false,
    clusterSecret: config.clusterSecret ?? loopbackClusterSecret,
    logLevel: config.logLevel ?? "info",
    limits: Object.freeze({ ...defaultGatewayLimits, ...config.limits }),
  });
  const checked = configSchema.safeParse(resolved);
  if (!checked.success) {
    const issue = checked.error.issues[0];
    const field = issue?.path.join(".") ?? "config";
    throw new ClusterError("INVALID_ARGUMENT", `gateway ${field}: ${issue?.message ?? "invalid"}`, {
      parameter: field,
    });
  }
  return resolved;
}

const environmentSchema = z.object({
  KIVIMESH_GATEWAY_ID: z.string().min(1).optional(),
  KIVIMESH_HOST: z.string().min(1).optional(),
  KIVIMESH_HTTP_PORT: z.coerce.number().pipe(port).optional(),
  KIVIMESH_GRPC_PORT: z.coerce.number().pipe(port).optional(),
  KIVIMESH_CLUSTER_SECRET: z.string().optional(),
  KIVIMESH_ALLOW_INSECURE: z.enum(["0", "1", "true", "false"]).optional(),
  KIVIMESH_LOG_LEVEL: logLevel.optional(),
  KIVIMESH_MAX_REQUESTS: z.coerce.number().pipe(positive).optional(),
  KIVIMESH_MAX_QUEUED_JOBS: z.coerce.number().pipe(positive).optional(),
});

/** The configuration that environment variables give. Throws INVALID_ARGUMENT that names the variable. */
export function gatewayConfigFromEnvironment(environment: Record<string, string | undefined>): GatewayConfig {
  const parsed = environmentSchema.safeParse(environment);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    const name = issue?.path.join(".") ?? "environment";
    throw new ClusterError("INVALID_ARGUMENT", `${name}: ${issue?.message ?? "invalid"}`, { parameter: name });
  }
  const values = parsed.data;
  const limits = {
    ...defined("maxRequests", values.KIVIMESH_MAX_REQUESTS),
    ...defined("maxQueuedJobs", values.KIVIMESH_MAX_QUEUED_JOBS),
  };
  return {
    ...defined("id", values.KIVIMESH_GATEWAY_ID),
    ...defined("host", values.KIVIMESH_HOST),
    ...defined("httpPort", values.KIVIMESH_HTTP_PORT),
    ...defined("grpcPort", values.KIVIMESH_GRPC_PORT),
    ...defined("clusterSecret", values.KIVIMESH_CLUSTER_SECRET),
    ...defined("logLevel", values.KIVIMESH_LOG_LEVEL),
    ...defined("logLevel", values.KIVIMESH_LOG_LEVEL),
    allowInsecure: values.KIVIMESH_ALLOW_INSECURE === "1" || values.KIVIMESH_ALLOW_INSECURE === "true",
    limits,
  };
}

function defined<K extends string, V>(key: K, value: V | undefined): Partial<Record<K, V>> {
  return value === undefined ? {} : ({ [key]: value } as Partial<Record<K, V>>);
}
