import { type JobQueues, type Membership, toClusterError } from "@kivimesh/proto";
import type { Logger } from "pino";

/** Looks in each grace period, so that a queue goes at most one and a half of them after its worker. */
const looksInGrace = 2;

export interface QueueJanitorOptions {
  readonly jobQueues: JobQueues;
  readonly membership: Membership;
  /** Workers that stream to this gateway: one that drains has left the membership, and still has its queue. */
  readonly connectedIds: () => readonly string[];
  /** How long a worker has to be away before its queue is removed. */
  readonly graceMs: number;
  readonly log: Logger;
}

/**
 * Removes the queues of workers that are gone for good, with the prompts in them. It asks the store, not its memory: queues
 * of workers that died before this gateway started go too. A job in them has long been moved or ended by its gateway.
 */
export class QueueJanitor {
  private readonly options: QueueJanitorOptions;
  /** When each absent worker with a queue was first missed. */
  private readonly missedMs = new Map<string, number>();
  private timer: NodeJS.Timeout | undefined;
  private looking: Promise<void> | undefined;

  constructor(options: QueueJanitorOptions) {
    this.options = options;
  }

  start(): void {
    this.timer = setInterval(() => {
      // A slow store gets one look at a time.
      this.looking ??= this.look().finally(() => {
        this.looking = undefined;
      });
    }, this.options.graceMs / looksInGrace);
  }

  /** Resolves when nothing of it runs any more. */
  async close(): Promise<void> {
    clearInterval(this.timer);
    await this.looking;
  }

  private async look(): Promise<void> {
    const { jobQueues, log } = this.options;
    try {
      for (const id of await this.overdue()) {
        await jobQueues.forget(id);
        this.missedMs.delete(id);
        log.info({ worker: id }, "the queue of a worker that is gone was removed");
      }
    } catch (error) {
      log.debug({ reason: toClusterError(error).message }, "queues of dead workers are looked for again later");
    }
  }

  /** Workers with a queue that have been away at every look for the whole grace. */
  private async overdue(): Promise<string[]> {
    const { jobQueues, membership, connectedIds, graceMs } = this.options;
    const [queued, members] = await Promise.all([jobQueues.workerIds(), membership.list("worker")]);
    const present = new Set([...members.map((member) => member.id), ...connectedIds()]);
    const absent = new Set(queued.filter((id) => !present.has(id)));
    for (const id of [...this.missedMs.keys()]) {
      if (!absent.has(id)) this.missedMs.delete(id);
    }
    const now = performance.now();
    return [...absent].filter((id) => {
      const since = this.missedMs.get(id) ?? now;
      this.missedMs.set(id, since);
      return now - since >= graceMs;
    });
  }
}
