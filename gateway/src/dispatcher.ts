import { create } from "@bufbuild/protobuf";
import {
  blockIds,
  ClusterError,
  chainRoot,
  type GenerateJob,
  GenerateJobSchema,
  hex,
  type JobQueues,
  toClusterError,
} from "@kivimesh/proto";
import type { Logger } from "pino";
import type { GatewayLimits } from "./config.ts";
import { type QueueMonitor, withQueueTimeout } from "./queue-monitor.ts";
import { chooseWorker, defaultRouterAssumptions, type RouterWorker } from "./router.ts";
import type { RunningRequest } from "./running-request.ts";
import type { LiveWorker, WorkerRegistry } from "./worker-registry.ts";

export interface DispatcherOptions {
  readonly gatewayId: string;
  readonly jobQueues: JobQueues;
  readonly registry: WorkerRegistry;
  readonly monitor: QueueMonitor;
  readonly limits: GatewayLimits;
  readonly log: Logger;
  /** All requests of this gateway, for their share of each worker's load. */
  readonly running: () => Iterable<RunningRequest>;
}

/** Finds a worker for an attempt and puts the job into its queue. */
export class Dispatcher {
  private readonly options: DispatcherOptions;

  constructor(options: DispatcherOptions) {
    this.options = options;
  }

  /**
   * Sends attempt `epoch` of `run`. A job that gets into the queue after `wanted` has turned false is taken out again.
   * Throws NO_WORKER or QUEUE_UNAVAILABLE.
   */
  async dispatch(run: RunningRequest, epoch: number, wanted: () => boolean, deadlineUnixMs: number): Promise<void> {
    const { jobQueues, monitor, limits, registry, log } = this.options;
    const worker = this.choose(run);
    run.workerId = worker.id;
    run.kvFormat = worker.linked.kvFormat;
    const enqueued = jobQueues.enqueue(worker.id, this.job(run, epoch, deadlineUnixMs)).then(() => {
      monitor.enqueued();
      if (!wanted()) {
        void jobQueues.remove(worker.id, run.id, epoch).catch((error: unknown) => {
          log.debug({ request: run.id, reason: toClusterError(error).message }, "job not removed");
        });
        void registry.abort(worker.id, run.id, epoch);
      }
    });
    try {
      await withQueueTimeout(enqueued, limits.queueTimeoutMs);
    } catch (error) {
      monitor.failed();
      const { code, message } = toClusterError(error);
      const reason = code === "QUEUE_UNAVAILABLE" ? message : "the job queue cannot be reached; try again shortly";
      if (run.ledger.epoch === epoch) run.workerId = "";
      throw new ClusterError("QUEUE_UNAVAILABLE", reason, { cause: error });
    }
  }

  /** Whether workers could run it, but each of them refused it already. */
  refusedByAll(run: RunningRequest): boolean {
    const able = this.able(run);
    return able.length > 0 && able.every((worker) => run.refusedBy.has(worker.id));
  }

  private able(run: RunningRequest): LiveWorker[] {
    const { model, workerId } = run.request;
    return this.options.registry
      .live()
      .filter((worker) => worker.linked.model === model && (workerId === "" || worker.id === workerId));
  }

  private choose(run: RunningRequest): LiveWorker {
    const willing = this.able(run).filter((worker) => !run.refusedBy.has(worker.id));
    // Another KV format would continue the text with other values.
    const sameFormat = willing.filter((worker) => worker.linked.kvFormat === run.kvFormat);
    const candidates = sameFormat.length > 0 ? sameFormat : willing;
    const tokens = this.tokens(run);
    const ids = new Map(candidates.map((worker) => [formatKey(worker), this.prefixIds(run, worker, tokens)] as const));
    const choice = chooseWorker(
      { promptTokens: tokens.length, blockIds: ids },
      candidates.map((worker) => this.snapshot(worker)),
      { ...defaultRouterAssumptions, fetchable: this.options.registry.hasCachestore },
    );
    const chosen = candidates.find((worker) => worker.id === choice?.workerId);
    if (chosen === undefined) {
      const { model, workerId } = run.request;
      const what = workerId === "" ? `no live worker serves ${model.name}` : `worker ${workerId} is not live`;
      throw new ClusterError("NO_WORKER", `${what}; try again shortly`);
    }
    this.options.log.debug({ request: run.id, ...choice }, "routed");
    return chosen;
  }

  private tokens(run: RunningRequest): number[] {
    return [...run.request.prompt, ...run.ledger.tokens];
  }

  private prefixIds(run: RunningRequest, worker: LiveWorker, tokens: readonly number[]): string[] {
    const { blockTokens, residualTokens, kvFormatId, model } = worker.linked;
    const root = chainRoot({
      modelDigest: model.digest,
      formatId: kvFormatId,
      blockTokens,
      residualTokens,
      tenantNamespace: run.request.tenantNamespace,
    });
    return blockIds(root, tokens, blockTokens).map(hex);
  }

  private snapshot(worker: LiveWorker): RouterWorker {
    const { load, held } = worker.link;
    const own = [...this.options.running()].filter((run) => run.workerId === worker.id);
    const ownWaiting = own.filter((run) => run.firstTokenMs === undefined);
    const ownPromptTokens = ownWaiting.reduce((sum, run) => sum + run.request.prompt.length, 0);
    // The worker's report is up to 250 ms old and counts the same requests: the larger number is the better one.
    return {
      id: worker.id,
      format: formatKey(worker),
      blockTokens: worker.linked.blockTokens,
      blockBytes: worker.linked.blockBytes,
      held,
      running: Math.max(load?.running ?? 0, own.length - ownWaiting.length),
      waiting: Math.max(load?.waiting ?? 0, ownWaiting.length),
      waitingPromptTokens: Math.max(load?.waitingPromptTokens ?? 0, ownPromptTokens),
      prefillTokensPerSecond: load?.prefillTokensPerSecond ?? 0,
    };
  }

  private job(run: RunningRequest, epoch: number, deadlineUnixMs: number): GenerateJob {
    const { request } = run;
    return create(GenerateJobSchema, {
      requestId: run.id,
      epoch,
      gatewayId: this.options.gatewayId,
      modelDigest: request.model.digestHex,
      tokens: this.tokens(run),
      promptTokens: request.prompt.length,
      maxTokens: run.remaining,
      temperature: request.temperature,
      topP: request.topP,
      topK: request.topK,
      seed: request.seed,
      stopTokenIds: [...request.stopTokenIds],
      tenantNamespace: request.tenantNamespace,
      deadlineUnixMs: BigInt(Math.ceil(deadlineUnixMs)),
      // The first token's logits exist once.
      returnFirstLogits: request.returnFirstLogits && run.ledger.tokens.length === 0,
    });
  }
}

function formatKey(worker: LiveWorker): string {
  const { model, kvFormatId, blockTokens, residualTokens } = worker.linked;
  return `${model.digestHex}/${kvFormatId}/${blockTokens}/${residualTokens}`;
}
