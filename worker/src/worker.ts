/** Composes a worker: engine thread, gRPC service, job consumer, KV transfer, metrics. */
import type { GetModelResponse, JobQueues, Membership } from "@kivimesh/proto";
import type { WorkerConfig } from "./config.ts";
import type { EngineStats } from "./engine-stats.ts";

/** What a worker shares with the rest of its cluster. The caller opens and closes them. */
export interface WorkerSeams {
  readonly jobQueues: JobQueues;
  readonly membership: Membership;
}

export interface WorkerService {
  readonly id: string;
  /** `host:port` of the gRPC listener. */
  readonly address: string;
  /** `http://host:port/metrics`, where a metrics port was given. */
  readonly metricsUrl: string | undefined;
  /** What GetModel answers. */
  readonly model: GetModelResponse;
  /** Loaded, listening, announced and not draining. */
  ready(): boolean;
  stats(): Promise<EngineStats>;
  /** Resolves with the reason if the GPU or its thread is gone; the worker is of no use then: exit and restart. */
  readonly failed: Promise<Error>;
  /** Leaves the membership, finishes running requests for up to `graceMs`, then closes. */
  drain(graceMs: number): Promise<void>;
  /** Ends at once; running requests fail with WORKER_DRAINING. */
  close(): Promise<void>;
}

/** @throws ClusterError INVALID_ARGUMENT, MODEL_…, GPU_UNAVAILABLE. */
export async function startWorker(config: WorkerConfig, _seams: WorkerSeams): Promise<WorkerService> {
  throw new RangeError(`cannot start ${config.id} yet`);
}
