/** The queue and the membership that services share: Redis's, or in this process. */
import {
  createLogger,
  type JobQueues,
  type LogLevel,
  localMembership,
  type Membership,
  pgliteJobQueues,
  redisJobQueues,
  redisMembership,
} from "@kivimesh/proto";

export interface ClusterSeams {
  readonly jobQueues: JobQueues;
  readonly membership: Membership;
  close(): Promise<void>;
}

/** BullMQ and membership on Redis, for services in processes of their own. */
export function redisSeams(url: string, logLevel: LogLevel): ClusterSeams {
  const logger = createLogger("redis", logLevel);
  const jobQueues = redisJobQueues({ url, logger });
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
