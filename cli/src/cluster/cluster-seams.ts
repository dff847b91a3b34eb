/** The queue and the membership that services share: Redis's, or in this process. */
import {
  ClusterError,
  createLogger,
  type JobQueues,
  type LogLevel,
  localMembership,
  type Membership,
  pgliteJobQueues,
  redisJobQueues,
  redisMembership,
} from "@kivimesh/proto";
import { UsageError } from "../usage-error.ts";

export interface ClusterSeams {
  readonly jobQueues: JobQueues;
  readonly membership: Membership;
  close(): Promise<void>;
}

/**
 * BullMQ and membership on Redis, for services in processes of their own.
 * @throws UsageError where `url` is none, ClusterError QUEUE_UNAVAILABLE where no Redis answers: at the start that is a
 *   wrong address more often than an outage, and it should be seen before a model is loaded.
 */
export async function redisSeams(url: string, logLevel: LogLevel): Promise<ClusterSeams> {
  if (!URL.canParse(url) || !["redis:", "rediss:"].includes(new URL(url).protocol)) {
    throw new UsageError(`--redis is ${JSON.stringify(url)}; it must be like redis://HOST:PORT`);
  }
  const logger = createLogger("redis", logLevel);
  const jobQueues = redisJobQueues({ url, logger });
  try {
    await jobQueues.ping();
  } catch (cause) {
    await jobQueues.close();
    throw new ClusterError("QUEUE_UNAVAILABLE", `no Redis answers at ${new URL(url).host}; is it running?`, { cause });
  }
  const membership = redisMembership({ url, logger });
  return {
    jobQueues,
    membership,
    async close() {
      await Promise.all([jobQueues.close(), membership.close()]);
    },
  };
}

/** BullMQ on PGlite and a membership inside this process, for the embedded cluster. Waiting jobs end with the process. */
export async function embeddedSeams(logLevel: LogLevel): Promise<ClusterSeams> {
  const jobQueues = await pgliteJobQueues({ logger: createLogger("queue", logLevel) });
  const membership = localMembership();
  return {
    jobQueues,
    membership,
    async close() {
      await Promise.all([jobQueues.close(), membership.close()]);
    },
  };
}
