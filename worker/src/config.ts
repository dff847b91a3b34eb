/** Configuration of workers and engines. The command line owns flags and their environment variables. */
import { mkdirSync } from "node:fs";
import { tmpdir, userInfo } from "node:os";
import { join } from "node:path";
import { ClusterError, type TlsFiles } from "@kivimesh/proto";
import { z } from "zod";

/**
 * `invariant`: a sequence's results depend neither on the batch nor on what was cached. `fast`: blocks sealed while
 * decoding are shared too, and resumed sequences are prefilled; equal up to rounding.
 */
export type Numerics = "invariant" | "fast";

/** What an engine runs. Undefined sizes take the model runner's defaults. */
export interface EngineConfig {
  /** A .gguf file or a model folder; exactly one of this and `dummyArchitecture`. */
  readonly modelPath?: string | undefined;
  /** Random weights of this architecture. */
  readonly dummyArchitecture?: string | undefined;
  readonly dummySeed?: number | undefined;
  /** Name the model is served under. Default: the file's. */
  readonly modelName?: string | undefined;
  /** Default kivi2r. */
  readonly kvFormat?: string | undefined;
  /** Default 128. */
  readonly blockTokens?: number | undefined;
  /** R. Default 128. */
  readonly residualTokens?: number | undefined;
  /** Sequences that run at once. Default 8. */
  readonly maxSequences?: number | undefined;
  /** Bytes of GPU memory for sealed pages. */
  readonly kvBytes?: number | undefined;
  /** Prefill rows of one step. Default: 128 on software drivers, 1024 on hardware, but never less than R. */
  readonly maxPrefillRows?: number | undefined;
  readonly maxContextTokens?: number | undefined;
  /** See EngineOptions. Default: 8 on hardware, 1 on software drivers. */
  readonly decodeStepsPerSubmit?: number | undefined;
  /** See EngineOptions. Default: 30. */
  readonly submitLatencyMs?: number | undefined;
  /** See EngineOptions. Default: 2 on hardware, 1 on software drivers. */
  readonly submitsInFlight?: number | undefined;
  /** Steps without prefill between two with it, while something decodes. Default: 1 on hardware, 4 on software drivers. */
  readonly decodeStepsPerPrefill?: number | undefined;
  /** Steps that a small prefill waits for more, while something decodes: throughput for latency. Default: 0. */
  readonly prefillPatience?: number | undefined;
  /** Default "invariant". */
  readonly numerics?: Numerics | undefined;
  /** Substring of the GPU adapter's name, where several are installed. */
  readonly gpuAdapter?: string | undefined;
}

/** A worker process or, embedded, one worker of several. */
export interface WorkerConfig extends EngineConfig {
  /** Unique in the cluster; names the worker's queue. Letters, digits, ".", "_" and "-". */
  readonly id: string;
  /** Of the gRPC listener. Default 127.0.0.1. */
  readonly host?: string | undefined;
  /** 0, the default: any free port. */
  readonly port?: number | undefined;
  readonly tls?: TlsFiles | undefined;
  readonly allowInsecure?: boolean | undefined;
  /** `host:port`. Undefined: the first cachestore that the membership names, if any. */
  readonly cachestoreAddress?: string | undefined;
  /** Serves /metrics, /healthz and /readyz here; 0: any free port; undefined: not at all. */
  readonly metricsPort?: number | undefined;
  /** pino level. Default "info". */
  readonly logLevel?: string | undefined;
  /** Bytes loaded so far and in all, and what they are. */
  readonly onProgress?: ((done: number, total: number, phase: string) => void) | undefined;
}

const positive = z.coerce.number().int().min(1);
const port = z.coerce.number().int().min(0).max(65_535);

const configSchema = z.object({
  id: z.string().regex(/^[A-Za-z0-9._-]{1,100}$/, 'must be 1 to 100 letters, digits, ".", "_" or "-"'),
  port: port.optional(),
  metricsPort: port.optional(),
  maxSequences: positive.max(4096).optional(),
  kvBytes: positive.optional(),
  maxPrefillRows: positive.optional(),
  blockTokens: positive.optional(),
  residualTokens: positive.optional(),
  maxContextTokens: positive.optional(),
  decodeStepsPerSubmit: positive.optional(),
  submitLatencyMs: z.coerce.number().positive().optional(),
  submitsInFlight: positive.optional(),
  decodeStepsPerPrefill: z.coerce.number().int().min(0).optional(),
  prefillPatience: z.coerce.number().int().min(0).optional(),
  numerics: z.enum(["invariant", "fast"]).optional(),
  logLevel: z.enum(["trace", "debug", "info", "warn", "error", "fatal", "silent"]).optional(),
});

/** Checks a worker's configuration. @throws ClusterError INVALID_ARGUMENT naming the field. */
export function checkWorkerConfig(config: WorkerConfig): WorkerConfig {
  const checked = configSchema.safeParse(config);
  if (!checked.success) {
    const issue = checked.error.issues[0];
    throw invalid(issue?.path.join(".") ?? "config", issue?.message ?? "invalid");
  }
  checkEngineConfig(config);
  return Object.freeze({ ...config });
}

/** @throws ClusterError INVALID_ARGUMENT where not exactly one model source is given. */
export function checkEngineConfig(config: EngineConfig): void {
  if ((config.modelPath === undefined) === (config.dummyArchitecture === undefined)) {
    throw invalid("modelPath", "give exactly one of a model path and a dummy architecture");
  }
}

function invalid(field: string, message: string): ClusterError {
  return new ClusterError("INVALID_ARGUMENT", `worker ${field}: ${message}`, { parameter: field });
}

/**
 * Names the private runtime folder that the Vulkan loader wants, where nobody did: containers often have none. The
 * command line sets this and more for its processes; this is for those that start a worker without it. It must run
 * before the engine thread starts: a thread copies the environment of its parent once.
 */
export function prepareDriverEnvironment(environment: NodeJS.ProcessEnv): void {
  if (environment.XDG_RUNTIME_DIR) return;
  const folder = join(tmpdir(), `kivimesh-runtime-${userInfo().uid}`);
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  environment.XDG_RUNTIME_DIR = folder;
}
