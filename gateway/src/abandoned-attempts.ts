import { type JobQueues, toClusterError } from "@kivimesh/proto";
import type { Logger } from "pino";
import { withQueueTimeout } from "./queue-monitor.ts";
import type { WorkerRegistry } from "./worker-registry.ts";

/** Attempts that were told to end and may still send; forgotten ones are only told again. */
const maxRemembered = 4096;

export interface AbandonedAttemptsOptions {
  readonly jobQueues: JobQueues;
  readonly registry: WorkerRegistry;
  readonly queueTimeoutMs: number;
  readonly log: Logger;
}

/** Ends attempts that nobody waits for, wherever they are: in the queue or running. */
export class AbandonedAttempts {
  private readonly options: AbandonedAttemptsOptions;
  private readonly told = new Set<string>();

  constructor(options: AbandonedAttemptsOptions) {
    this.options = options;
  }

  /** Ends an attempt. Returns whether it still waited, so that its worker will say nothing of it. */
  async end(workerId: string, requestId: string, epoch: number): Promise<boolean> {
    const { jobQueues, registry, queueTimeoutMs, log } = this.options;
    const key = attemptKey(workerId, requestId, epoch);
    this.remember(key);
    const removing = withQueueTimeout(jobQueues.remove(workerId, requestId, epoch), queueTimeoutMs).catch(
      (error: unknown) => {
        log.debug({ request: requestId, reason: toClusterError(error).message }, "job not removed");
        return false;
      },
    );
    const [removed, delivered] = await Promise.all([removing, registry.abort(workerId, requestId, epoch)]);
    if (!delivered) {
      this.told.delete(key);
    }
    return removed;
  }

  /** A message came from an attempt that nobody waits for: it is told to end, unless it has been. */
  heardFrom(workerId: string, requestId: string, epoch: number): void {
    if (!this.told.has(attemptKey(workerId, requestId, epoch))) {
      void this.end(workerId, requestId, epoch);
    }
  }

  private remember(key: string): void {
    const oldest = this.told.values().next().value;
    if (this.told.size >= maxRemembered && oldest !== undefined) {
      this.told.delete(oldest);
    }
    this.told.add(key);
  }
}

function attemptKey(workerId: string, requestId: string, epoch: number): string {
  return `${workerId}/${requestId}.${epoch}`;
}
