import type { GenerateJob } from "./gen/kivimesh/v1/worker_pb.ts";

export interface QueueCounts {
  waiting: number;
  active: number;
}

/** Runs one job. Its promise ends the job; a rejection is logged by the consumer's owner and never retried here. */
export type JobHandler = (job: GenerateJob, signal: AbortSignal) => Promise<void>;

export interface JobConsumer {
  /** Takes no new jobs; running ones go on. */
  pause(): Promise<void>;
  /** Aborts the signals of running jobs, waits for their handlers, and leaves the queue. */
  close(): Promise<void>;
  activeJobs(): number;
}

/** One queue of generate jobs for each worker. A job is delivered at most once: the gateway alone re-queues, with a new epoch. */
export interface JobQueues {
  /** Lower `priority` runs first; 0 (the default) before all others. Throws QUEUE_UNAVAILABLE. */
  enqueue(workerId: string, job: GenerateJob, options?: { priority?: number }): Promise<void>;
  /** Removes the job if it still waits; whether it did. Throws QUEUE_UNAVAILABLE. */
  remove(workerId: string, requestId: string, epoch: number): Promise<boolean>;
  counts(workerId: string): Promise<QueueCounts>;
  consume(workerId: string, handler: JobHandler, options: { concurrency: number }): Promise<JobConsumer>;
  /** Resolves if the queue answers. Throws QUEUE_UNAVAILABLE. */
  ping(): Promise<void>;
  close(): Promise<void>;
}
