import { Redis } from "ioredis";
import { pino } from "pino";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { localMembership } from "./local-membership.ts";
import { createLogger } from "./logging.ts";
import type { Member, Membership } from "./membership.ts";
import { redisMembership } from "./redis-membership.ts";
import { type RedisServer, startRedis } from "./testing/redis-server.ts";

const logger = createLogger("test", "silent");
let redis: RedisServer;

beforeAll(async () => {
  redis = await startRedis();
});

afterAll(() => redis.stop());

const one: Member = { id: "w1", role: "worker", address: "127.0.0.1:1", modelDigestHex: "ab" };
const two: Member = { id: "w2", role: "worker", address: "127.0.0.1:2" };
const store: Member = { id: "c1", role: "cachestore", address: "127.0.0.1:3" };

const backends: [string, () => Membership][] = [
  ["local", () => localMembership()],
  ["Redis", () => redisMembership({ url: redis.url, logger })],
];

describe.each(backends)("%s membership", (_, open) => {
  it("lists who announced, by role, sorted", async () => {
    const membership = open();
    expect(await membership.list("worker")).toEqual([]);
    const announced = [
      await membership.announce(two),
      await membership.announce(one),
      await membership.announce(store),
    ];
    expect(await membership.list("worker")).toEqual([one, two]);
    expect(await membership.list("cachestore")).toEqual([store]);
    await Promise.all(announced.map((each) => each.withdraw()));
    expect(await membership.list("worker")).toEqual([]);
    await membership.close();
  });

  it("tells watchers of every change until they stop", async () => {
    const membership = open();
    const seen: string[][] = [];
    const stop = membership.watch("worker", (members) => void seen.push(members.map((each) => each.id)));
    const first = await membership.announce(one);
    await expect.poll(() => seen.at(-1)).toEqual(["w1"]);
    await membership.announce(store);
    const second = await membership.announce(two);
    await expect.poll(() => seen.at(-1)).toEqual(["w1", "w2"]);
    await first.withdraw();
    await expect.poll(() => seen.at(-1)).toEqual(["w2"]);
    stop();
    const count = seen.length;
    await second.withdraw();
    await new Promise((resolve) => setTimeout(resolve, 400));
    expect(seen.length).toBe(count);
    await membership.close();
  });

  it("keeps a restarted member when its predecessor withdraws late", async () => {
    const membership = open();
    const before = await membership.announce(one);
    const moved = { ...one, address: "127.0.0.1:9" };
    const after = await membership.announce(moved);
    await before.withdraw();
    expect(await membership.list("worker")).toEqual([moved]);
    await after.withdraw();
    expect(await membership.list("worker")).toEqual([]);
    await membership.close();
  });
});

describe("Redis membership over processes and outages", () => {
  it("tells a watcher that threw again, and logs what it threw as an error", async () => {
    const lines: string[] = [];
    const loud = pino({ level: "error" }, { write: (line: string) => void lines.push(line) });
    const membership = redisMembership({ url: redis.url, logger: loud });
    const seen: string[][] = [];
    membership.watch("worker", (members) => {
      seen.push(members.map((each) => each.id));
      if (seen.length === 1) throw new Error("on purpose");
    });
    await expect.poll(() => seen.length).toBe(2);
    expect(seen[1]).toEqual(seen[0]);
    expect(lines.join("")).toContain("on purpose");
    await membership.close();
  });

  it("drops a member that falls silent, within its ttl", async () => {
    const dying = redisMembership({ url: redis.url, logger });
    const watching = redisMembership({ url: redis.url, logger });
    const plain = new Redis(redis.url);
    await dying.announce({ ...one, id: "dies" }, 900);
    await new Promise((resolve) => setTimeout(resolve, 1_500));
    expect((await watching.list("worker")).map((each) => each.id)).toEqual(["dies"]);
    // What a killed process looks like: the key is there and nobody renews it.
    await plain.set("kivimesh:member:worker:dead", JSON.stringify({ ...two, id: "dead" }), "PX", 500);
    await plain.sadd("kivimesh:members:worker", "dead");
    expect((await watching.list("worker")).length).toBe(2);
    await new Promise((resolve) => setTimeout(resolve, 700));
    expect((await watching.list("worker")).map((each) => each.id)).toEqual(["dies"]);
    expect(await plain.smembers("kivimesh:members:worker")).toEqual(["dies"]);
    plain.disconnect();
    await dying.close();
    expect(await watching.list("worker")).toEqual([]);
    await watching.close();
  });

  it("keeps the last list while Redis is away, and everyone comes back to an empty Redis", async () => {
    const own = await startRedis();
    const membership = redisMembership({ url: own.url, logger });
    const seen: number[] = [];
    membership.watch("worker", (members) => void seen.push(members.length));
    await membership.announce(one, 1_500);
    await expect.poll(() => seen.at(-1)).toBe(1);
    await own.kill();
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    expect(seen.at(-1)).toBe(1);
    await own.restart();
    const plain = new Redis(own.url);
    await plain.flushall();
    plain.disconnect();
    await expect.poll(async () => (await membership.list("worker")).length, { timeout: 10_000 }).toBe(1);
    await membership.close();
    await own.stop();
  });
});
