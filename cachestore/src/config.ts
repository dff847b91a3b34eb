import { randomUUID } from "node:crypto";
import { ClusterError, type Logger, type LogLevel, type Membership, type TlsFiles } from "@kivimesh/proto";
import { z } from "zod";

/** How a cachestore runs. Everything but the folder has a default. */
export interface CachestoreConfig {
  /** Name in membership and metrics. Default: made up at each start. */
  id?: string;
  /** Default 127.0.0.1. Another than loopback needs TLS or `allowInsecure`. */
  host?: string;
  /** Default 0: any free port. */
  port?: number;
  /** `host:port` under which others reach it, where that is not `host` and `port`. */
  advertisedAddress?: string;
  /** Folder of the LMDB file; one process at a time. */
  dataDirectory: string;
  /** Payload bytes kept in memory. Default 256 MiB; 0: none. */
  memoryBytes?: number;
  /** Bytes of the LMDB file. Default 8 GiB. Blocks take at most half of it: LMDB needs the rest to reuse what was freed. */
  diskBytes?: number;
  /** Port of /metrics, /healthz and /readyz; left out: none. */
  metricsPort?: number;
  logLevel?: LogLevel;
  allowInsecure?: boolean;
  tls?: TlsFiles;
  /** Where it announces itself; left out: nowhere. */
  membership?: Membership;
  /** Instead of a logger of its own. */
  logger?: Logger;
}

export const defaultMemoryBytes = 256 * 1024 * 1024;
export const defaultDiskBytes = 8 * 1024 * 1024 * 1024;

const port = z.coerce.number().int().min(0).max(65_535);
const bytes = z.coerce.number().int().min(0).max(Number.MAX_SAFE_INTEGER);

const environmentSchema = z.object({
  KIVIMESH_ID: z.string().min(1).optional(),
  KIVIMESH_HOST: z.string().min(1).optional(),
  KIVIMESH_PORT: port.optional(),
  KIVIMESH_ADVERTISED_ADDRESS: z.string().min(1).optional(),
  KIVIMESH_DATA_DIRECTORY: z.string().min(1),
  KIVIMESH_MEMORY_BYTES: bytes.optional(),
  KIVIMESH_DISK_BYTES: bytes.min(1024 * 1024).optional(),
  KIVIMESH_METRICS_PORT: port.optional(),
  KIVIMESH_LOG_LEVEL: z.enum(["fatal", "error", "warn", "info", "debug", "trace", "silent"]).optional(),
  KIVIMESH_ALLOW_INSECURE: z.enum(["0", "1", "true", "false"]).optional(),
});

/** Reads `KIVIMESH_*` variables. Throws INVALID_ARGUMENT that names the variable and what it allows. */
export function cachestoreConfigFromEnvironment(environment: Record<string, string | undefined>): CachestoreConfig {
  const parsed = environmentSchema.safeParse(environment);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    const name = issue?.path.join(".") ?? "";
    throw new ClusterError("INVALID_ARGUMENT", `${name}: ${issue?.message}`, { parameter: name });
  }
  const values = parsed.data;
  const config: CachestoreConfig = { dataDirectory: values.KIVIMESH_DATA_DIRECTORY };
  const optional: Partial<CachestoreConfig> = withoutUndefined({
    id: values.KIVIMESH_ID,
    host: values.KIVIMESH_HOST,
    port: values.KIVIMESH_PORT,
    advertisedAddress: values.KIVIMESH_ADVERTISED_ADDRESS,
    memoryBytes: values.KIVIMESH_MEMORY_BYTES,
    diskBytes: values.KIVIMESH_DISK_BYTES,
    metricsPort: values.KIVIMESH_METRICS_PORT,
    logLevel: values.KIVIMESH_LOG_LEVEL,
    allowInsecure: values.KIVIMESH_ALLOW_INSECURE && ["1", "true"].includes(values.KIVIMESH_ALLOW_INSECURE),
  });
  return { ...config, ...optional };
}

/** A config with every default filled in. */
export function completeConfig(config: CachestoreConfig) {
  return {
    ...config,
    id: config.id ?? `cachestore-${randomUUID().slice(0, 8)}`,
    host: config.host ?? "127.0.0.1",
    port: config.port ?? 0,
    memoryBytes: config.memoryBytes ?? defaultMemoryBytes,
    diskBytes: config.diskBytes ?? defaultDiskBytes,
    logLevel: config.logLevel ?? ("info" as const),
  };
}

function withoutUndefined<T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  const defined = Object.entries(values).filter(([, value]) => value !== undefined);
  return Object.fromEntries(defined) as { [K in keyof T]?: Exclude<T[K], undefined> };
}
