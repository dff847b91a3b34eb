import { afterEach, beforeEach, expect, it, vi } from "vitest";
import type { EngineStats } from "./engine-stats.ts";
import { GatewayStreams, gatewayGraceMs, type StreamEvent } from "./gateway-streams.ts";

const load = (running: number) => ({ running, waiting: 0, freePages: 1, totalPages: 1 }) as EngineStats;
const token = (index: number): StreamEvent => ({ event: { case: "tokens", value: { requestId: "r", index } } });

let gone: string[];
let streams: GatewayStreams;

beforeEach(() => {
  vi.useFakeTimers();
  gone = [];
  streams = new GatewayStreams((id) => gone.push(id));
});

afterEach(() => {
  streams.close();
  vi.useRealTimers();
});

function subscribe(id: string) {
  const leave = new AbortController();
  const events = streams.subscribe(id, leave.signal);
  return { next: async () => (await events.next()).value?.event, leave: () => leave.abort(), events };
}

it("starts with the load and all held blocks, then sends what changes", async () => {
  streams.load(load(1));
  streams.prefix({ added: ["aa"], removed: [] });
  const gateway = subscribe("g");
  expect(await gateway.next()).toMatchObject({ case: "load", value: { running: 1 } });
  expect(await gateway.next()).toMatchObject({
    case: "prefix",
    value: { cleared: true, added: [new Uint8Array([0xaa])], removed: [] },
  });
  streams.prefix({ added: ["bb"], removed: ["aa"] });
  expect(await gateway.next()).toMatchObject({
    case: "prefix",
    value: { cleared: false, removed: [new Uint8Array([0xaa])] },
  });
  streams.load(load(1));
  streams.load(load(2));
  vi.advanceTimersByTime(300);
  expect(await gateway.next()).toMatchObject({ case: "load", value: { running: 2 } });
});

it("replaces the older stream of a gateway, which is not gone then", async () => {
  const older = subscribe("g");
  await older.next();
  const newer = subscribe("g");
  await newer.next();
  expect(await older.next()).toBeUndefined();
  vi.advanceTimersByTime(2 * gatewayGraceMs);
  expect(gone).toEqual([]);
  streams.send("g", token(7));
  expect(await newer.next()).toMatchObject({ case: "tokens", value: { index: 7 } });
});

it("tells that a gateway is gone only when its grace has passed", async () => {
  for (const comesBack of [true, false]) {
    const gateway = subscribe("g");
    await gateway.next();
    gateway.leave();
    expect(await gateway.next()).toBeUndefined();
    vi.advanceTimersByTime(gatewayGraceMs - 1);
    expect(gone).toEqual([]);
    if (comesBack) continue;
    vi.advanceTimersByTime(1);
    expect(gone).toEqual(["g"]);
  }
});

it("waits for a gateway that is about to subscribe, not for ever", async () => {
  const comes = streams.listens("g");
  await subscribe("g").next();
  expect(await comes).toBe(true);
  const never = streams.listens("other");
  vi.advanceTimersByTime(gatewayGraceMs);
  expect(await never).toBe(false);
});

it("cuts a stream that is not read", async () => {
  const gateway = subscribe("g");
  await gateway.next();
  for (let index = 0; index < 20_000; index++) streams.send("g", token(index));
  expect(streams.size).toBe(0);
  const drain = async () => {
    while ((await gateway.next()) !== undefined) {
      // Everything that was buffered still comes.
    }
  };
  await expect(drain()).rejects.toMatchObject({ code: "UNAVAILABLE" });
  vi.advanceTimersByTime(gatewayGraceMs);
  expect(gone).toEqual(["g"]);
});
