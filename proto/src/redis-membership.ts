import { Redis } from "ioredis";
import { z } from "zod";
import { createLogger, type Logger } from "./logging.ts";
import { type Announcement, type Member, type MemberRole, type Membership, memberTtlMs } from "./membership.ts";

/** How often watchers look, in milliseconds. */
const watchIntervalMs = 250;
const commandTimeoutMs = 2_000;

const memberSchema = z.object({
  id: z.string().min(1),
  role: z.enum(["worker", "cachestore"]),
  address: z.string().min(1),
  modelDigestHex: z.string().optional(),
});

/**
 * Membership in Redis: a key with a TTL for each member, renewed at a third of it, and a set of ids for each role.
 * A Redis that lost its data gets everyone back at the next renewal.
 */
export function redisMembership(options: { url: string; logger?: Logger }): Membership {
  const logger = options.logger ?? createLogger("membership", "warn");
  const redis = new Redis(options.url, {
    commandTimeout: commandTimeoutMs,
    maxRetriesPerRequest: 1,
    retryStrategy: (attempt) => Math.min(attempt * 50, 500),
  });
  redis.on("error", (error) => logger.debug({ err: error }, "redis connection"));
  const stops = new Set<() => void | Promise<void>>();
  return {
    async announce(member, ttlMs = memberTtlMs) {
      const announcement = await announceIn(redis, member, ttlMs, logger);
      stops.add(announcement.withdraw);
      return {
        async withdraw() {
          stops.delete(announcement.withdraw);
          await announcement.withdraw();
        },
      };
    },
    list: (role) => listFrom(redis, role),
    watch(role, callback) {
      const stop = watchIn(redis, role, callback, logger);
      stops.add(stop);
      return () => {
        stops.delete(stop);
        stop();
      };
    },
    async close() {
      await Promise.all([...stops].map((stop) => stop()));
      redis.disconnect();
    },
  };
}

async function announceIn(redis: Redis, member: Member, ttlMs: number, logger: Logger): Promise<Announcement> {
  const key = memberKey(member.role, member.id);
  const value = JSON.stringify(memberSchema.parse(member));
  const beat = async () => {
    await redis.multi().set(key, value, "PX", ttlMs).sadd(roleKey(member.role), member.id).exec();
  };
  await beat();
  let beating = Promise.resolve();
  const timer = setInterval(() => {
    beating = beat().catch((error: Error) => logger.warn({ err: error, member: member.id }, "heartbeat failed"));
  }, ttlMs / 3);
  return {
    async withdraw() {
      clearInterval(timer);
      // A heartbeat on its way would put the member back.
      await beating;
      try {
        await redis.eval(removeIfSame, 2, key, roleKey(member.role), value, member.id);
      } catch (error) {
        logger.warn({ err: error, member: member.id }, "could not withdraw; the ttl will");
      }
    },
  };
}

/** A restarted member may have announced itself again under the same id: its entry stays. */
const removeIfSame = `
if redis.call("GET", KEYS[1]) == ARGV[1] then
  redis.call("DEL", KEYS[1])
  redis.call("SREM", KEYS[2], ARGV[2])
end`;

async function listFrom(redis: Redis, role: MemberRole): Promise<Member[]> {
  const ids = (await redis.smembers(roleKey(role))).sort();
  if (ids.length === 0) {
    return [];
  }
  const values = await redis.mget(ids.map((id) => memberKey(role, id)));
  const gone = ids.filter((_, index) => values[index] === null);
  if (gone.length > 0) {
    // A member that comes back in between is put back by its next heartbeat.
    await redis.srem(roleKey(role), gone);
  }
  return values.flatMap((value) => (value === null ? [] : [toMember(value)]));
}

function toMember(value: string): Member {
  const { modelDigestHex, ...rest } = memberSchema.parse(JSON.parse(value));
  return modelDigestHex === undefined ? rest : { ...rest, modelDigestHex };
}

function watchIn(redis: Redis, role: MemberRole, callback: (members: Member[]) => void, logger: Logger): () => void {
  let last: string | undefined;
  let stopped = false;
  let timer: NodeJS.Timeout | undefined;
  /** Whether the watcher took the list; one that threw is told again at the next look. */
  const tell = (members: Member[]): boolean => {
    try {
      callback(members);
      return true;
    } catch (error) {
      logger.error({ err: error, role }, "a watcher of the membership failed; it is told again");
      return false;
    }
  };
  const look = async () => {
    try {
      const members = await listFrom(redis, role);
      const now = JSON.stringify(members);
      if (!stopped && now !== last && tell(members)) {
        last = now;
      }
    } catch (error) {
      logger.debug({ err: error, role }, "membership cannot be read; the last list stands");
    }
    if (!stopped) {
      timer = setTimeout(look, watchIntervalMs);
    }
  };
  void look();
  return () => {
    stopped = true;
    clearTimeout(timer);
  };
}

function roleKey(role: MemberRole): string {
  return `kivimesh:members:${role}`;
}

function memberKey(role: MemberRole, id: string): string {
  return `kivimesh:member:${role}:${id}`;
}
