import { describe, expect, it } from "vitest";
import type { FollowedEvent } from "./block-store.ts";
import { EventLog } from "./event-log.ts";

const id = (value: number) => new Uint8Array(32).fill(value);

async function take(events: AsyncGenerator<FollowedEvent>, count: number): Promise<string[]> {
  const taken: string[] = [];
  while (taken.length < count) {
    const { value } = await events.next();
    const event = value as FollowedEvent;
    taken.push(`${event.number} ${event.kind}${event.kind === "cleared" ? "" : ` ${event.blockId[0]}`}`);
  }
  return taken;
}

const snapshot = () => [{ blockId: id(77), parentId: id(76) }];

describe("EventLog", () => {
  it("replays after a kept number, then goes on live", async () => {
    const log = new EventLog(10n);
    const { signal } = new AbortController();
    log.append("stored", id(1), id(0));
    log.append("stored", id(2), id(1));
    log.append("removed", id(2), id(1));
    const events = log.follow(11n, signal, snapshot);
    expect(await take(events, 2)).toEqual(["12 stored 2", "13 removed 2"]);
    const next = take(events, 1);
    log.append("stored", id(3), id(0));
    expect(await next).toEqual(["14 stored 3"]);
    const fresh = take(log.follow(0n, signal, snapshot), 1);
    await new Promise((resolve) => setImmediate(resolve));
    log.append("removed", id(3), id(0));
    expect(await fresh).toEqual(["15 removed 3"]);
  });

  it.each([
    ["too old", 5n],
    ["from the future", 99n],
  ])("starts over for a number that is %s", async (_, after) => {
    const log = new EventLog(10n);
    log.append("stored", id(1), id(0));
    const events = log.follow(after, new AbortController().signal, snapshot);
    expect(await take(events, 2)).toEqual(["11 cleared", "11 stored 77"]);
    const next = take(events, 1);
    log.append("stored", id(2), id(1));
    expect(await next).toEqual(["12 stored 2"]);
  });

  it("keeps a bounded number, and starts over for a follower that fell behind", async () => {
    const log = new EventLog(0n, 4);
    const events = log.follow(0n, new AbortController().signal, snapshot);
    const first = take(events, 1);
    log.append("stored", id(1), id(0));
    expect(await first).toEqual(["1 stored 1"]);
    for (let index = 0; index < 20; index++) {
      log.append("stored", id(index), id(0));
    }
    expect(await take(events, 2)).toEqual(["21 cleared", "21 stored 77"]);
    expect(await take(log.follow(17n, new AbortController().signal, snapshot), 1)).toEqual(["18 stored 16"]);
  });

  it("ends when the follower leaves", async () => {
    const log = new EventLog(0n);
    const abort = new AbortController();
    const events = log.follow(0n, abort.signal, snapshot);
    const next = events.next();
    abort.abort();
    expect(await next).toEqual({ done: true, value: undefined });
  });
});
