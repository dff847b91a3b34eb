import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { WaitingError } from "bullmq";
import { ClusterError } from "./errors.ts";
import { type GenerateJob, GenerateJobSchema } from "./gen/kivimesh/v1/worker_pb.ts";
import type { Logger } from "./logging.ts";
import { plainBytes } from "./plain-bytes.ts";

export interface QueueCounts {
  waiting: number;
  active: number;
}

/** Runs one job. Its promise ends the job; a rejection is logged and the job is not tried again. */
export type JobHandler = (job: GenerateJob, signal: AbortSignal) => Promise<void>;

export interface JobConsumer {
  /** Takes no new jobs; running ones go on. */
  pause(): Promise<void>;
  /** Aborts the signals of running jobs, waits for their handlers, and leaves the queue. */
  close(): Promise<void>;
  activeJobs(): number;
}

/**
 * One queue of generate jobs for each worker. A job is delivered at most once: the gateway alone re-queues, with a new
 * epoch. Every method throws QUEUE_UNAVAILABLE when the queue's store does not answer within `queueDeadlineMs`.
 */
export interface JobQueues {
  /** Lower `priority` runs first; 0 (the default) before all others. The same request and epoch is queued once. */
  enqueue(workerId: string, job: GenerateJob, options?: { priority?: number }): Promise<void>;
  /** Removes the job if it still waits; tells whether it did. A job that runs is left alone. */
  remove(workerId: string, requestId: string, epoch: number): Promise<boolean>;
  counts(workerId: string): Promise<QueueCounts>;
  consume(workerId: string, handler: JobHandler, options: { concurrency: number }): Promise<JobConsumer>;
  /** Every worker that the store holds anything of, dead ones included. */
  workerIds(): Promise<string[]>;
  /** Removes all that the store holds of a worker that will not come back, running jobs included. */
  forget(workerId: string): Promise<void>;
  /** Resolves if the queue's store answers. */
  ping(): Promise<void>;
  close(): Promise<void>;
}

/** How long any queue operation may take, in milliseconds. */
export const queueDeadlineMs = 3_000;
/** Largest BullMQ priority. */
export const maxJobPriority = 2_097_151;
/** After this time without use the sending end of a queue is closed, in milliseconds. Much longer than any operation. */
const defaultSenderIdleMs = 60_000;
const queuePrefix = "kivimesh-worker-";
/** What a client is told to wait when the queue is away, in milliseconds. */
const retryAfterMs = 1_000;
/** How long a leaving consumer waits for its store before it breaks the connection, in milliseconds. */
const closeGraceMs = 5_000;

/** The protobuf bytes of a GenerateJob, as JSON can carry them. */
interface QueuedJob {
  job: string;
}

/** What is used of a BullMQ Queue, whatever its backend. */
interface BackedQueue {
  add(name: string, data: QueuedJob, options: { jobId: string; priority: number }): Promise<unknown>;
  getJob(jobId: string): Promise<unknown>;
  remove(jobId: string): Promise<number>;
  getJobCounts(...states: ("waiting" | "prioritized" | "active")[]): Promise<Record<string, number>>;
  pause(): Promise<void>;
  resume(): Promise<void>;
  obliterate(options: { force: boolean }): Promise<void>;
  on(event: "error", listener: (error: Error) => void): unknown;
  close(): Promise<void>;
}

/** What is used of a BullMQ Worker, whatever its backend. */
interface BackedWorker {
  waitUntilReady(): Promise<unknown>;
  pause(doNotWaitActive: boolean): Promise<void>;
  close(force?: boolean): Promise<void>;
  on(event: "error", listener: (error: Error) => void): unknown;
  on(event: "failed", listener: (job: { id?: string | undefined } | undefined, error: Error) => void): unknown;
}

/** What is used of a BullMQ Job. */
interface BackedJob {
  data: QueuedJob;
  moveToWait(token?: string): Promise<unknown>;
}

/** How to reach the store behind BullMQ: one implementation for each backend. */
export interface QueueStore {
  queue(name: string): BackedQueue;
  worker(name: string, processor: (job: BackedJob, token?: string) => Promise<void>, concurrency: number): BackedWorker;
  /** Names of all queues that start with `prefix`. */
  names(prefix: string): Promise<string[]>;
  ping(): Promise<unknown>;
  close(): Promise<void>;
}

/** Options of every BullMQ Queue: nothing is kept after a job ends. */
export const queueOptions = {
  defaultJobOptions: { attempts: 1, removeOnComplete: true, removeOnFail: true },
} as const;

/** Options of every BullMQ Worker: a stalled job fails at once, so that nothing runs twice unfenced. */
export const workerOptions = {
  maxStalledCount: 0,
  removeOnComplete: { count: 0 },
  removeOnFail: { count: 0 },
} as const;

/** Job queues over any BullMQ store. */
export function jobQueuesOver(
  store: QueueStore,
  logger: Logger,
  senderIdleMs: number = defaultSenderIdleMs,
): JobQueues {
  const senders = new QueueSenders(store, logger, senderIdleMs);
  const consumers = new Set<JobConsumer>();
  const queueOf = (workerId: string) => senders.get(queueName(workerId));
  return {
    async enqueue(workerId, job, options = {}) {
      const jobId = jobIdOf(job.requestId, job.epoch);
      const priority = checkPriority(options.priority ?? 0);
      const data = { job: Buffer.from(toBinary(GenerateJobSchema, job)).toString("base64") };
      await withinDeadline(queueOf(workerId).add("generate", data, { jobId, priority }));
    },
    async remove(workerId, requestId, epoch) {
      const queue = queueOf(workerId);
      const jobId = jobIdOf(requestId, epoch);
      // BullMQ answers 1 for a job that is not there, and 0 for one that runs.
      return (await withinDeadline(queue.getJob(jobId))) != null && (await withinDeadline(queue.remove(jobId))) === 1;
    },
    async counts(workerId) {
      const counts = await withinDeadline(queueOf(workerId).getJobCounts("waiting", "prioritized", "active"));
      return { waiting: (counts.waiting ?? 0) + (counts.prioritized ?? 0), active: counts.active ?? 0 };
    },
    async consume(workerId, handler, { concurrency }) {
      // A `forget` that was interrupted leaves the queue paused.
      await withinDeadline(queueOf(workerId).resume());
      const consumer = await openConsumer(store, queueName(workerId), handler, concurrency, logger);
      const tracked: JobConsumer = {
        ...consumer,
        async close() {
          consumers.delete(tracked);
          await consumer.close();
        },
      };
      consumers.add(tracked);
      return tracked;
    },
    async workerIds() {
      const names = await withinDeadline(store.names(queuePrefix));
      return names.map((name) => name.slice(queuePrefix.length)).sort();
    },
    async forget(workerId) {
      const queue = queueOf(workerId);
      await withinDeadline(queue.pause());
      await withinDeadline(queue.obliterate({ force: true }));
      await senders.close(queueName(workerId));
    },
    async ping() {
      senders.closeIdle();
      await withinDeadline(store.ping());
    },
    async close() {
      await Promise.all([...consumers].map((consumer) => consumer.close()));
      await senders.closeAll();
      await settle(store.close(), closeGraceMs);
    },
  };
}

/** The sending ends of queues. Those of workers that are no longer asked for are closed, whoever forgot to say so. */
class QueueSenders {
  readonly #store: QueueStore;
  readonly #logger: Logger;
  readonly #idleMs: number;
  /** By name, the longest unused first. */
  readonly #senders = new Map<string, { queue: BackedQueue; usedMs: number }>();

  constructor(store: QueueStore, logger: Logger, idleMs: number) {
    this.#store = store;
    this.#logger = logger;
    this.#idleMs = idleMs;
  }

  get(name: string): BackedQueue {
    this.closeIdle();
    const queue = this.#senders.get(name)?.queue ?? this.#open(name);
    this.#senders.delete(name);
    this.#senders.set(name, { queue, usedMs: performance.now() });
    return queue;
  }

  closeIdle(): void {
    const oldest = performance.now() - this.#idleMs;
    for (const [name, { usedMs }] of this.#senders) {
      if (usedMs > oldest) {
        break;
      }
      void this.close(name);
    }
  }

  async close(name: string): Promise<void> {
    const sender = this.#senders.get(name);
    this.#senders.delete(name);
    if (sender !== undefined) {
      await settle(sender.queue.close(), closeGraceMs);
    }
  }

  async closeAll(): Promise<void> {
    await Promise.all([...this.#senders.keys()].map((name) => this.close(name)));
  }

  #open(name: string): BackedQueue {
    const queue = this.#store.queue(name);
    queue.on("error", (error) => this.#logger.debug({ err: error, queue: name }, "queue connection"));
    return queue;
  }
}

async function openConsumer(
  store: QueueStore,
  name: string,
  handler: JobHandler,
  concurrency: number,
  logger: Logger,
): Promise<JobConsumer> {
  const running = new Set<AbortController>();
  let accepting = true;
  const run = async (queued: BackedJob, token?: string): Promise<void> => {
    if (!accepting) {
      // BullMQ was already waiting for a job when it was paused, and took one more.
      await queued.moveToWait(token);
      throw new WaitingError();
    }
    const abort = new AbortController();
    running.add(abort);
    try {
      await handler(fromBinary(GenerateJobSchema, plainBytes(Buffer.from(queued.data.job, "base64"))), abort.signal);
    } finally {
      running.delete(abort);
    }
  };
  const worker = store.worker(name, run, concurrency);
  worker.on("error", (error) => logger.debug({ err: error, queue: name }, "queue connection"));
  worker.on("failed", (job, error) => logger.warn({ err: error, queue: name, job: job?.id }, "job failed"));
  try {
    await withinDeadline(worker.waitUntilReady());
  } catch (error) {
    await settle(worker.close(true), closeGraceMs);
    throw error;
  }
  return {
    async pause() {
      accepting = false;
      await worker.pause(true);
    },
    async close() {
      accepting = false;
      for (const abort of running) {
        abort.abort();
      }
      if (!(await settle(worker.close(), closeGraceMs))) {
        logger.warn({ queue: name }, "the queue did not let go in time; its connection is cut");
        await settle(worker.close(true), closeGraceMs);
      }
    },
    activeJobs: () => running.size,
  };
}

/** BullMQ allows no ":" in names; ids are kept to what is safe in every store. */
function queueName(workerId: string): string {
  if (!/^[\w.-]{1,128}$/.test(workerId)) {
    throw new ClusterError("INVALID_ARGUMENT", `worker id "${workerId}" is not 1 to 128 of A-Z a-z 0-9 _ . -`);
  }
  return queuePrefix + workerId;
}

function jobIdOf(requestId: string, epoch: number): string {
  if (!/^[\w-]{1,128}$/.test(requestId)) {
    throw new ClusterError("INVALID_ARGUMENT", `request id "${requestId}" is not 1 to 128 of A-Z a-z 0-9 _ -`);
  }
  return `${requestId}.${epoch}`;
}

function checkPriority(priority: number): number {
  if (!Number.isInteger(priority) || priority < 0 || priority > maxJobPriority) {
    throw new ClusterError("INVALID_ARGUMENT", `priority ${priority} is not an integer from 0 to ${maxJobPriority}`, {
      parameter: "priority",
    });
  }
  return priority;
}

async function withinDeadline<T>(operation: Promise<T>): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no answer within ${queueDeadlineMs} ms`)), queueDeadlineMs);
  });
  try {
    return await Promise.race([operation, late]);
  } catch (error) {
    throw new ClusterError("QUEUE_UNAVAILABLE", "the job queue cannot be reached; try again later", {
      retryAfterMs,
      cause: error,
    });
  } finally {
    clearTimeout(timer);
  }
}

/** Waits for a clean-up that may fail or hang with its store; whether it ended in time. */
async function settle(cleanUp: Promise<unknown>, graceMs: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), graceMs);
  });
  const ended = cleanUp.then(
    () => true,
    // A store that is gone has nothing left to clean up.
    () => true,
  );
  const result = await Promise.race([ended, late]);
  clearTimeout(timer);
  return result;
}
