import { setTimeout as delay } from "node:timers/promises";
import { ClusterError, type JobQueues, toClusterError } from "@kivimesh/proto";
import type { Logger } from "pino";

const checkEveryMs = 1_000;

/** Bounds `work` in time. Throws QUEUE_UNAVAILABLE after `timeoutMs`; the work itself goes on unobserved. */
export async function withQueueTimeout<T>(work: Promise<T>, timeoutMs: number): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(
      () => reject(new ClusterError("QUEUE_UNAVAILABLE", `the job queue did not answer within ${timeoutMs} ms`)),
      timeoutMs,
    );
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Knows whether the queue answers and how much waits in it, without asking at each request. */
export class QueueMonitor {
  private readonly queues: JobQueues;
  private readonly workerIds: () => readonly string[];
  private readonly timeoutMs: number;
  private readonly log: Logger;
  private readonly closing = new AbortController();
  private reachable = false;
  private waitingJobs = 0;
  private enqueuedSince = 0;

  constructor(queues: JobQueues, workerIds: () => readonly string[], timeoutMs: number, log: Logger) {
    this.queues = queues;
    this.workerIds = workerIds;
    this.timeoutMs = timeoutMs;
    this.log = log;
  }

  /** Whether the last check or enqueue reached the queue. */
  get healthy(): boolean {
    return this.reachable;
  }

  /** Jobs that wait at all live workers: the last count and what this gateway added since. An upper bound. */
  get waiting(): number {
    return this.waitingJobs + this.enqueuedSince;
  }

  /** Checks once, then every second until `close`. */
  async start(): Promise<void> {
    await this.check();
    void this.loop();
  }

  enqueued(): void {
    this.enqueuedSince += 1;
  }

  /** An enqueue failed: refuse requests at once until a check succeeds. */
  failed(): void {
    this.reachable = false;
  }

  close(): void {
    this.closing.abort();
  }

  private async loop(): Promise<void> {
    while (!this.closing.signal.aborted) {
      await delay(checkEveryMs, undefined, { signal: this.closing.signal }).catch(() => undefined);
      if (!this.closing.signal.aborted) {
        await this.check();
      }
    }
  }

  private async check(): Promise<void> {
    try {
      await withQueueTimeout(this.queues.ping(), this.timeoutMs);
      const counting = Promise.all(this.workerIds().map((id) => this.queues.counts(id)));
      const counts = await withQueueTimeout(counting, this.timeoutMs);
      this.waitingJobs = counts.reduce((sum, count) => sum + count.waiting, 0);
      this.enqueuedSince = 0;
      if (!this.reachable) {
        this.log.info("the job queue answers");
      }
      this.reachable = true;
    } catch (error) {
      if (this.reachable) {
        this.log.error({ reason: toClusterError(error).message }, "the job queue does not answer");
      }
      this.reachable = false;
    }
  }
}
