import { Queue, Worker } from "bullmq";
import { Redis } from "ioredis";
import { type JobQueues, jobQueuesOver, queueDeadlineMs, queueOptions, workerOptions } from "./job-queue.ts";
import { createLogger, type Logger } from "./logging.ts";

/** Keys that Redis looks at in one step of a scan. */
const scanStep = 1_000;

/**
 * Job queues in Redis (BullMQ). The connection opens lazily and comes back by itself; while Redis is away, operations fail
 * with QUEUE_UNAVAILABLE instead of piling up in memory, and consumers wait.
 */
export function redisJobQueues(options: { url: string; logger?: Logger }): JobQueues {
  const logger = options.logger ?? createLogger("queue", "warn");
  const redis = new Redis(options.url, {
    commandTimeout: queueDeadlineMs,
    connectTimeout: queueDeadlineMs,
    maxRetriesPerRequest: 1,
    retryStrategy: reconnectDelayMs,
  });
  redis.on("error", (error) => logger.debug({ err: error }, "redis connection"));
  return jobQueuesOver(
    {
      queue: (name) => new Queue(name, { ...queueOptions, connection: redis }),
      worker: (name, processor, concurrency) =>
        new Worker(name, processor, {
          ...workerOptions,
          concurrency,
          connection: { url: options.url, maxRetriesPerRequest: null, retryStrategy: reconnectDelayMs },
        }),
      names: (prefix) => queueNames(redis, prefix),
      ping: () => redis.ping(),
      close: async () => redis.disconnect(),
    },
    logger,
  );
}

/** BullMQ keeps a queue in keys `bull:<name>:<part>`. SCAN goes in small steps, so that nobody waits for it. */
async function queueNames(redis: Redis, prefix: string): Promise<string[]> {
  const names = new Set<string>();
  let cursor = "0";
  do {
    const [next, keys] = await redis.scan(cursor, "MATCH", `bull:${prefix}*`, "COUNT", scanStep);
    for (const key of keys) {
      names.add(key.split(":")[1] ?? "");
    }
    cursor = next;
  } while (cursor !== "0");
  return [...names];
}

function reconnectDelayMs(attempt: number): number {
  return Math.min(attempt * 50, 1_000);
}
