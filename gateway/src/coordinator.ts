import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import {
  ClusterError,
  type ErrorCode,
  type Finished,
  Finished_Outcome,
  isErrorCode,
  type JobQueues,
  type Tokens,
  toClusterError,
  type Usage,
} from "@kivimesh/proto";
import type { Logger } from "pino";
import { AbandonedAttempts } from "./abandoned-attempts.ts";
import type { GatewayLimits } from "./config.ts";
import { Dispatcher } from "./dispatcher.ts";
import type { QueueMonitor } from "./queue-monitor.ts";
import { type RequestOutcome, RunningRequest, type TokenRequest } from "./running-request.ts";
import { clientUsage } from "./usage.ts";
import type { WorkerRegistry } from "./worker-registry.ts";

/** How often a request without a worker looks for one beside being told of each that joins. */
const redispatchEveryMs = 500;
const drainPollMs = 20;

/** Failures of one worker that another may not have. */
const failuresOfWorker: ReadonlySet<ErrorCode> = new Set<ErrorCode>([
  ...(["WORKER_DRAINING", "WORKER_LOST", "DEVICE_LOST", "PAGE_POOL_EXHAUSTED", "UNAVAILABLE"] as const),
]);

/** Is told what happens to requests; metrics are made of it. */
export interface CoordinatorObserver {
  /** `seconds` since the request was admitted. */
  firstToken(seconds: number): void;
  /** `count` tokens came `seconds` after the ones before. */
  laterTokens(seconds: number, count: number): void;
  ended(how: RequestOutcome | ErrorCode, seconds: number, usage: Usage | undefined): void;
  refused(code: ErrorCode): void;
  requeued(reason: string): void;
}

export interface CoordinatorOptions {
  readonly gatewayId: string;
  readonly jobQueues: JobQueues;
  readonly registry: WorkerRegistry;
  readonly monitor: QueueMonitor;
  readonly limits: GatewayLimits;
  readonly log: Logger;
  readonly observer: CoordinatorObserver;
}

/**
 * Runs requests on workers: admits them, sends each attempt to the worker the router chooses, moves a request whose
 * worker is lost to another with the next epoch and the tokens so far, and ends attempts that nobody waits for.
 */
export class Coordinator {
  private readonly options: CoordinatorOptions;
  private readonly dispatcher: Dispatcher;
  private readonly runs = new Map<string, RunningRequest>();
  private readonly timers = new Map<string, NodeJS.Timeout>();
  private readonly abandoned: AbandonedAttempts;
  private isDraining = false;

  constructor(options: CoordinatorOptions) {
    this.options = options;
    this.dispatcher = new Dispatcher({ ...options, running: () => this.runs.values() });
    this.abandoned = new AbandonedAttempts({ ...options, queueTimeoutMs: options.limits.queueTimeoutMs });
  }

  get running(): number {
    return this.runs.size;
  }

  /** Requests whose first token has not come. */
  get waiting(): number {
    return [...this.runs.values()].filter((run) => run.firstTokenMs === undefined).length;
  }

  get draining(): boolean {
    return this.isDraining;
  }

  /** Throws what a request of now would be refused with: GATEWAY_DRAINING, QUEUE_UNAVAILABLE or QUEUE_FULL. */
  admit(): void {
    try {
      this.checkAdmission();
    } catch (error) {
      this.options.observer.refused(toClusterError(error).code);
      throw error;
    }
  }

  /** Puts a request into a worker's queue. Throws as `admit` does, or NO_WORKER. The caller reads it, or cancels it. */
  async start(request: TokenRequest): Promise<RunningRequest> {
    this.admit();
    const run = new RunningRequest(randomUUID(), request, performance.now());
    this.runs.set(run.id, run);
    const epoch = run.ledger.beginAttempt();
    const { requestTimeoutMs } = this.options.limits;
    this.timer(run, requestTimeoutMs, () =>
      this.fail(run, new ClusterError("DEADLINE_EXCEEDED", `not finished within ${requestTimeoutMs / 1000} s`)),
    );
    try {
      await this.dispatcher.dispatch(run, epoch, () => this.isCurrent(run, epoch), Date.now() + requestTimeoutMs);
    } catch (error) {
      const known = toClusterError(error);
      this.forget(run);
      this.options.observer.refused(known.code);
      throw known;
    }
    return run;
  }

  /** Ends a request whose reader is satisfied: it counts as `outcome` with its first `tokens` completion tokens. */
  stop(run: RunningRequest, outcome: RequestOutcome, tokens: number): void {
    if (run.done || run.stopping !== undefined) {
      return;
    }
    run.stopping = { outcome, tokens };
    const finish = () => this.finish(run, undefined);
    if (run.workerId === "") {
      finish();
      return;
    }
    // The worker reports the usage when it has stopped; a job that still waited has none.
    this.timer(run, this.options.limits.abortWaitMs, () => {
      this.options.log.warn({ request: run.id, worker: run.workerId }, "a stopped attempt reported no usage");
      finish();
    });
    void this.abandoned.end(run.workerId, run.id, run.ledger.epoch).then((removed) => {
      if (removed) finish();
    });
  }

  /** Ends a request whose reader has gone. */
  cancel(run: RunningRequest): void {
    if (!run.done) {
      this.endAttempt(run);
      this.forget(run);
      this.ended(run, "cancelled", undefined);
    }
  }

  /** Stops the request with that id as cancelled. False: none is running here. */
  cancelById(requestId: string): boolean {
    const run = this.runs.get(requestId);
    if (run === undefined) {
      return false;
    }
    this.stop(run, "cancelled", run.ledger.tokens.length);
    return true;
  }

  tokens(workerId: string, message: Tokens): void {
    const run = this.attemptOf(workerId, message);
    if (run === undefined) {
      return;
    }
    const entry = run.ledger.enter(message.epoch, message.index, message.ids);
    if (entry.kind === "gap" && run.stopping !== undefined) {
      // Its reader has all it wants: another attempt would only make tokens for nobody.
      this.endAttempt(run);
      this.finish(run, undefined);
    } else if (entry.kind === "gap") {
      this.requeue(run, "gap", new ClusterError("WORKER_LOST", "tokens of the worker were lost"));
    } else if (entry.kind === "fresh" && entry.ids.length > 0 && run.stopping === undefined) {
      this.measure(run, entry.ids.length);
      const firstLogits = message.firstLogits.length > 0 ? message.firstLogits : undefined;
      run.push({ kind: "tokens", ids: entry.ids, firstLogits });
    }
  }

  finished(workerId: string, message: Finished): void {
    const run = this.attemptOf(workerId, message);
    if (run === undefined) {
      return;
    }
    if (run.stopping !== undefined) {
      this.finish(run, message.usage);
      return;
    }
    switch (message.outcome) {
      case Finished_Outcome.STOP_TOKEN:
        run.stopping = { outcome: "stop", tokens: run.ledger.tokens.length };
        this.finish(run, message.usage);
        break;
      case Finished_Outcome.LENGTH:
        run.stopping = { outcome: "length", tokens: run.ledger.tokens.length };
        this.finish(run, message.usage);
        break;
      case Finished_Outcome.FAILED:
        this.attemptFailed(run, message);
        break;
      default:
        this.requeue(run, "aborted", new ClusterError("WORKER_LOST", "the worker ended the request"));
        break;
    }
  }

  lost(workerId: string, reason: string): void {
    for (const run of [...this.runs.values()].filter((candidate) => candidate.workerId === workerId)) {
      if (run.stopping !== undefined) {
        this.finish(run, undefined);
      } else {
        this.requeue(run, "worker_lost", new ClusterError("WORKER_LOST", `worker ${workerId} was lost: ${reason}`));
      }
    }
  }

  /** Refuses new requests from now on; resolves when none runs any more, after `graceMs` at the latest. */
  async drain(graceMs: number): Promise<void> {
    this.isDraining = true;
    const until = Date.now() + graceMs;
    while (this.runs.size > 0 && Date.now() < until) {
      await delay(drainPollMs);
    }
    for (const run of [...this.runs.values()]) {
      this.fail(run, new ClusterError("GATEWAY_DRAINING", "the gateway is shutting down"));
    }
  }

  private checkAdmission(): void {
    const { limits, monitor } = this.options;
    if (this.isDraining) {
      throw new ClusterError("GATEWAY_DRAINING", "the gateway is shutting down");
    }
    if (!monitor.healthy) {
      throw new ClusterError("QUEUE_UNAVAILABLE", "the job queue cannot be reached; try again shortly");
    }
    if (this.runs.size >= limits.maxRequests) {
      throw new ClusterError(
        "QUEUE_FULL",
        `${limits.maxRequests} requests are in flight here already; try again later`,
      );
    }
    if (monitor.waiting >= limits.maxQueuedJobs) {
      throw new ClusterError("QUEUE_FULL", `${limits.maxQueuedJobs} requests wait already; try again later`);
    }
  }

  /** The request whose current attempt sent `message`. Attempts that nobody waits for are told to end. */
  private attemptOf(workerId: string, message: { requestId: string; epoch: number }): RunningRequest | undefined {
    const run = this.runs.get(message.requestId);
    if (run !== undefined && run.ledger.epoch === message.epoch && run.workerId === workerId) {
      return run;
    }
    this.abandoned.heardFrom(workerId, message.requestId, message.epoch);
    return undefined;
  }

  private attemptFailed(run: RunningRequest, message: Finished): void {
    const code = isErrorCode(message.errorCode) ? message.errorCode : "INTERNAL";
    const error = new ClusterError(code, message.errorMessage || "the worker failed");
    if (failuresOfWorker.has(code)) {
      run.refusedBy.add(run.workerId);
      this.requeue(run, code.toLowerCase(), error);
    } else {
      this.fail(run, error);
    }
  }

  /** Fences off the current attempt and looks for a worker for the next. */
  private requeue(run: RunningRequest, reason: string, error: ClusterError): void {
    const { limits, log, observer } = this.options;
    log.warn({ request: run.id, worker: run.workerId, generated: run.ledger.tokens.length, reason }, "request moves");
    this.endAttempt(run);
    run.workerId = "";
    const epoch = run.ledger.beginAttempt();
    observer.requeued(reason);
    if (run.remaining <= 0) {
      run.stopping = { outcome: "length", tokens: run.ledger.tokens.length };
      this.finish(run, undefined);
    } else if (epoch > limits.maxAttempts) {
      this.fail(run, error);
    } else {
      void this.redispatch(run, epoch, error);
    }
  }

  private async redispatch(run: RunningRequest, epoch: number, error: ClusterError): Promise<void> {
    const { limits, registry, log } = this.options;
    const until = Date.now() + limits.workerWaitMs;
    const deadline = Date.now() + limits.requestTimeoutMs - (performance.now() - run.startedMs);
    while (this.isCurrent(run, epoch)) {
      try {
        await this.dispatcher.dispatch(run, epoch, () => this.isCurrent(run, epoch), deadline);
        return;
      } catch (failure) {
        const { code, message } = toClusterError(failure);
        log.warn({ request: run.id, code, reason: message }, "no worker for the next attempt yet");
        const hopeless = this.dispatcher.refusedByAll(run);
        if (this.isCurrent(run, epoch) && (hopeless || Date.now() >= until)) {
          this.fail(run, code === "NO_WORKER" ? error : toClusterError(failure));
          return;
        }
      }
      await registry.nextJoin(redispatchEveryMs);
    }
  }

  private isCurrent(run: RunningRequest, epoch: number): boolean {
    return !run.done && run.ledger.epoch === epoch;
  }

  private measure(run: RunningRequest, count: number): void {
    const now = performance.now();
    if (run.lastTokenMs === undefined) {
      run.firstTokenMs = now;
      this.options.observer.firstToken((now - run.startedMs) / 1000);
    } else {
      this.options.observer.laterTokens((now - run.lastTokenMs) / 1000, count);
    }
    run.lastTokenMs = now;
  }

  private finish(run: RunningRequest, reported: Usage | undefined): void {
    const { stopping } = run;
    if (run.done || stopping === undefined) {
      return;
    }
    const facts = {
      promptTokens: run.request.prompt.length,
      completionTokens: stopping.tokens,
      worker: run.workerId,
      kvFormat: run.kvFormat,
    };
    const usage = clientUsage(facts, reported);
    this.forget(run);
    run.push({ kind: "finished", outcome: stopping.outcome, usage });
    this.ended(run, stopping.outcome, usage);
  }

  private fail(run: RunningRequest, error: ClusterError): void {
    if (!run.done) {
      this.endAttempt(run);
      this.forget(run);
      run.fail(error);
      this.ended(run, error.code, undefined);
    }
  }

  private ended(run: RunningRequest, how: RequestOutcome | ErrorCode, usage: Usage | undefined): void {
    const seconds = (performance.now() - run.startedMs) / 1000;
    this.options.observer.ended(how, seconds, usage);
    const { prompt, clientRequestId } = run.request;
    const counts = {
      promptTokens: prompt.length,
      completionTokens: run.ledger.tokens.length,
      attempts: run.ledger.epoch,
    };
    const facts = { request: run.id, clientRequestId, worker: run.workerId, outcome: how, ...counts, seconds };
    this.options.log.info(facts, "request ended");
  }

  private forget(run: RunningRequest): void {
    run.done = true;
    this.runs.delete(run.id);
    clearTimeout(this.timers.get(run.id));
    this.timers.delete(run.id);
  }

  private timer(run: RunningRequest, ms: number, act: () => void): void {
    clearTimeout(this.timers.get(run.id));
    this.timers.set(run.id, setTimeout(act, ms));
  }

  private endAttempt(run: RunningRequest): void {
    if (run.workerId !== "") {
      void this.abandoned.end(run.workerId, run.id, run.ledger.epoch);
    }
  }
}
