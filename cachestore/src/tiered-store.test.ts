import { readFile, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { clone } from "@bufbuild/protobuf";
import { hex, KvBlockHeaderSchema } from "@kivimesh/proto";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { BlockStore, StoredBlock } from "./block-store.ts";
import { diskBytesOf } from "./disk-tier.ts";
import { chain, idsOf, temporaryDirectory } from "./testing/sealed-blocks.ts";
import { openTieredStore, type TieredStoreOptions } from "./tiered-store.ts";

const payloadBytes = 10_000;
const blockBytes = diskBytesOf(payloadBytes);

/** The limit of a file with room for so many blocks. */
function budgetOf(blocks: number): number {
  return 2 * blocks * blockBytes;
}

let directory: string;
let store: BlockStore;
let now = 1_000_000;

beforeEach(async () => {
  directory = await temporaryDirectory();
  store = await open({});
});

afterEach(async () => {
  await store.close();
  await rm(directory, { recursive: true, force: true });
});

function open(options: Partial<TieredStoreOptions>): Promise<BlockStore> {
  const clock = { now: () => now, monotonicNow: () => now };
  return openTieredStore({ directory, memoryBytes: 40_000, diskBytes: budgetOf(100), ...clock, ...options });
}

async function reopen(options: Partial<TieredStoreOptions>): Promise<void> {
  await store.close();
  store = await open(options);
}

async function storeAll(blocks: readonly StoredBlock[]): Promise<void> {
  for (const block of blocks) {
    expect(await store.store(block)).toBe(true);
  }
}

function same(block: StoredBlock | undefined, expected: StoredBlock): boolean {
  return block !== undefined && Buffer.compare(block.payload, expected.payload) === 0;
}

describe("blocks", () => {
  it("come back as the same bytes, from memory and from disk", async () => {
    const blocks = chain("a", 10);
    await storeAll(blocks);
    for (const block of blocks) {
      const back = await store.fetch(block.header.blockId);
      expect(same(back, block)).toBe(true);
      expect(back?.header).toEqual(block.header);
    }
    await reopen({ memoryBytes: 0 });
    for (const block of blocks) {
      const back = await store.fetch(block.header.blockId);
      expect(same(back, block)).toBe(true);
      expect(back?.header).toEqual(block.header);
    }
    expect(await store.checkIntegrity({ payloads: true })).toEqual([]);
  });

  it("belong to their first writer", async () => {
    const [block] = chain("a", 1);
    const other = chain("a", 1, 5_000)[0]!;
    expect(await store.store(block!)).toBe(true);
    expect(await store.store(other)).toBe(false);
    expect(same(await store.fetch(block!.header.blockId), block!)).toBe(true);
    // Also when they write at the same time.
    const [racing] = chain("b", 1);
    expect(await Promise.all([1, 2, 3].map(() => store.store(racing!)))).toEqual([true, false, false]);
    expect(store.stats().blocks).toBe(2);
  });

  it("are refused when they do not match their header", async () => {
    const [block] = chain("a", 1);
    const payload = block!.payload.slice();
    payload[17]! ^= 4;
    await expect(store.store({ header: block!.header, payload })).rejects.toMatchObject({ code: "KV_BLOCK_CORRUPT" });
    const header = clone(KvBlockHeaderSchema, block!.header);
    header.payloadBytes--;
    await expect(store.store({ header, payload: block!.payload })).rejects.toMatchObject({ code: "KV_BLOCK_CORRUPT" });
    expect(store.stats()).toMatchObject({ blocks: 0, diskBytes: 0, memoryBytes: 0 });
  });
});

describe("lookup", () => {
  it("finds the longest prefix, and only a prefix", async () => {
    const blocks = chain("a", 6);
    await storeAll([...blocks.slice(0, 3), ...blocks.slice(4)]);
    expect(store.lookup(idsOf(blocks), 1000)).toMatchObject({ held: 3, leaseMs: 1000 });
    expect(store.lookup(idsOf(chain("b", 2)), 0)).toEqual({ held: 0, leaseId: "", leaseMs: 0 });
    expect(store.lookup([], 0).held).toBe(0);
    expect(store.stats()).toMatchObject({ hits: 3, misses: 5, leases: 1 });
  });

  it("does not follow a block that claims another parent", async () => {
    const blocks = chain("a", 2);
    const header = clone(KvBlockHeaderSchema, blocks[1]!.header);
    header.parentId = new Uint8Array(32).fill(5);
    await storeAll([blocks[0]!, { header, payload: blocks[1]!.payload }]);
    expect(store.lookup(idsOf(blocks), 0).held).toBe(1);
  });
});

describe("limits", () => {
  it("hold on both tiers, whatever comes, and on the file itself", async () => {
    await reopen({ memoryBytes: 25_000, diskBytes: budgetOf(20) });
    for (let index = 0; index < 60; index++) {
      await storeAll(chain(`c${index}`, 3));
      const { memoryBytes, diskBytes } = store.stats();
      expect(memoryBytes).toBeLessThanOrEqual(25_000);
      expect(diskBytes).toBeLessThanOrEqual(20 * blockBytes);
    }
    expect(store.stats().evicted).toBeGreaterThanOrEqual(160);
    expect(await store.checkIntegrity({ payloads: true })).toEqual([]);
    const { size } = await stat(join(directory, "blocks.mdb"));
    expect(size).toBeLessThanOrEqual(budgetOf(20));
  });

  it("hold on the file where blocks of many sizes come and go", async () => {
    const limit = 8 * 1024 * 1024;
    await reopen({ memoryBytes: 0, diskBytes: limit });
    for (let index = 0; index < 200; index++) {
      await storeAll(chain(`s${index}`, 2, 4_000 + ((index * 7_919) % 97) * 3_000));
      const { size } = await stat(join(directory, "blocks.mdb"));
      expect(size).toBeLessThanOrEqual(limit);
    }
    expect(store.stats().evicted).toBeGreaterThan(200);
  });

  it("keep out of memory what is evicted while it is read from disk", async () => {
    await reopen({ diskBytes: budgetOf(1) });
    let before = chain("r", 1)[0]!;
    await storeAll([before]);
    let read = 0;
    // Whether the read or the eviction reaches the disk first is up to its threads.
    for (let round = 0; round < 30 && read < 3; round++) {
      await reopen({ diskBytes: budgetOf(1) });
      const next = chain(`r${round}`, 1)[0]!;
      const reading = store.fetch(before.header.blockId);
      const storing = store.store(next);
      expect(store.has(before.header.blockId)).toBe(false);
      const back = await reading;
      expect(back === undefined || same(back, before)).toBe(true);
      read += back === undefined ? 0 : 1;
      expect(await storing).toBe(true);
      expect(await store.checkIntegrity({ payloads: true })).toEqual([]);
      before = next;
    }
    expect(read).toBeGreaterThan(0);
  });

  it("evict the oldest chain, tails before heads", async () => {
    await reopen({ diskBytes: budgetOf(6) });
    const [old, young] = [chain("old", 3), chain("young", 3)];
    await storeAll([...old, ...young]);
    store.release(store.lookup(idsOf(old), 1000).leaseId);
    // `old` was used last now, so `young` loses its tail.
    await storeAll(chain("new", 1));
    expect(young.map((block) => store.has(block.header.blockId))).toEqual([true, true, false]);
    expect(old.every((block) => store.has(block.header.blockId))).toBe(true);
  });

  it("never evict leased blocks; a lease ends by itself", async () => {
    await reopen({ diskBytes: budgetOf(4) });
    const leased = chain("leased", 4);
    await storeAll(leased);
    const { leaseId } = store.lookup(idsOf(leased).slice(0, 3), 5000);
    await storeAll(chain("x", 1));
    expect(leased.map((block) => store.has(block.header.blockId))).toEqual([true, true, true, false]);
    await storeAll(chain("y", 1));
    expect(leased.slice(0, 3).every((block) => store.has(block.header.blockId))).toBe(true);
    expect(store.lookup(idsOf(chain("y", 1)), 5000).held).toBe(1);
    await expect(store.store(chain("z", 1)[0]!)).rejects.toMatchObject({ code: "STORE_FULL" });
    expect(await store.checkIntegrity()).toEqual([]);
    store.release(leaseId);
    await storeAll(chain("z", 1));
    // The client of the other lease is stuck for ever; its lease is not.
    now += 5000;
    await storeAll([...chain("z1", 1), ...chain("z2", 1), ...chain("z3", 1), ...chain("z4", 1)]);
    expect(store.stats()).toMatchObject({ leases: 0, blocks: 4 });
  });

  it("refuse a block that is larger than the store", async () => {
    await reopen({ diskBytes: budgetOf(2) });
    await expect(store.store(chain("a", 1, 100_000)[0]!)).rejects.toMatchObject({ code: "STORE_FULL" });
    expect(store.stats().evicted).toBe(0);
  });

  it("hold for stores at the same time", async () => {
    await reopen({ diskBytes: budgetOf(10) });
    const blocks = Array.from({ length: 40 }, (_, index) => chain(`p${index}`, 1)[0]!);
    const results = await Promise.allSettled(blocks.map((block) => store.store(block)));
    expect(results.filter((each) => each.status === "fulfilled").length).toBeGreaterThanOrEqual(10);
    expect(store.stats().diskBytes).toBeLessThanOrEqual(10 * blockBytes);
    expect(await store.checkIntegrity({ payloads: true })).toEqual([]);
  });

  it("apply to what is there when they are lowered", async () => {
    await storeAll(chain("a", 10));
    await reopen({ diskBytes: budgetOf(4) });
    expect(store.lookup(idsOf(chain("a", 10)), 0).held).toBe(4);
    expect(await store.checkIntegrity({ payloads: true })).toEqual([]);
  });
});

describe("pins", () => {
  it("keep blocks until they run out, over a restart too", async () => {
    await reopen({ diskBytes: budgetOf(4) });
    const [pinned, other] = [chain("pinned", 2), chain("other", 2)];
    await storeAll([...pinned, ...other]);
    expect(await store.pin(idsOf(pinned), 60_000)).toBe(2);
    await reopen({ diskBytes: budgetOf(4) });
    await storeAll(chain("x", 3).slice(0, 2));
    expect(store.lookup(idsOf(pinned), 1).held).toBe(2);
    now += 60_001;
    await storeAll(chain("y", 4));
    expect(pinned.some((block) => store.has(block.header.blockId))).toBe(false);
  });

  it("can be taken back, and cannot fill the store", async () => {
    await reopen({ diskBytes: budgetOf(4) });
    const blocks = chain("a", 4);
    await storeAll(blocks);
    expect(await store.pin(idsOf(blocks), 60_000)).toBe(2);
    expect(await store.pin(idsOf(blocks), 60_000)).toBe(2);
    expect(await store.pin(idsOf(chain("nothing", 1)), 60_000)).toBe(0);
    expect(await store.pin(idsOf(blocks), 0)).toBe(0);
    await storeAll(chain("b", 4));
    expect(blocks.some((block) => store.has(block.header.blockId))).toBe(false);
  });
});

describe("damage", () => {
  it("of one bit on disk is a counted miss, and nothing after it is served", async () => {
    const blocks = chain("a", 5);
    const others = chain("b", 2);
    await storeAll([...blocks, ...others]);
    await store.close();
    await flipBit(blocks[2]!);
    store = await open({ memoryBytes: 0 });
    const ids = idsOf(blocks);
    // Nobody has read it yet, so the lookup still counts on it.
    expect(store.lookup(ids, 0).held).toBe(5);
    const before = store.stats();
    expect(same(await store.fetch(ids[1]!), blocks[1]!)).toBe(true);
    expect(await store.fetch(ids[2]!)).toBeUndefined();
    expect(await store.fetch(ids[3]!)).toBeUndefined();
    expect(store.lookup(ids, 0).held).toBe(2);
    expect(store.lookup(idsOf(others), 0).held).toBe(2);
    expect(store.stats()).toMatchObject({ corrupt: 1, misses: before.misses + 2 + 3, blocks: 4 });
    // What was dropped may come again.
    await storeAll(blocks.slice(2));
    expect(same(await store.fetch(ids[2]!), blocks[2]!)).toBe(true);
    expect(await store.checkIntegrity({ payloads: true })).toEqual([]);
  });

  it("shows in a deep check before anyone asks for the block", async () => {
    const blocks = chain("a", 3);
    await storeAll(blocks);
    await store.close();
    await flipBit(blocks[1]!);
    store = await open({});
    expect(await store.checkIntegrity()).toEqual([]);
    expect(await store.checkIntegrity({ payloads: true })).toEqual([
      `block ${hex(blocks[1]!.header.blockId)} is damaged on disk`,
    ]);
  });

  async function flipBit(block: StoredBlock): Promise<void> {
    const path = join(directory, "blocks.mdb");
    const file = await readFile(path);
    const at = file.indexOf(block.payload.subarray(100, 400));
    expect(at).toBeGreaterThan(0);
    file[at + 50]! ^= 0x10;
    await writeFile(path, file);
  }
});

describe("events", () => {
  it("number every change, also over a restart", async () => {
    await reopen({ diskBytes: budgetOf(3) });
    await storeAll(chain("a", 3));
    await storeAll(chain("b", 1));
    expect(store.stats().lastEvent).toBe(5n);
    const tail = idsOf(chain("a", 3))[2]!;
    const events = store.follow(3n, new AbortController().signal);
    const replayed = [(await events.next()).value, (await events.next()).value];
    expect(replayed).toMatchObject([
      { number: 4n, kind: "removed", blockId: tail },
      { number: 5n, kind: "stored", blockId: idsOf(chain("b", 1))[0]! },
    ]);
    await reopen({ diskBytes: budgetOf(3) });
    expect(store.stats().lastEvent).toBe(5n);
    // The log is new: whoever missed something gets a clean start with all that is held.
    const late = store.follow(3n, new AbortController().signal);
    const kinds = [];
    for (let index = 0; index < 4; index++) {
      kinds.push(((await late.next()).value as { kind: string }).kind);
    }
    expect(kinds).toEqual(["cleared", "stored", "stored", "stored"]);
    const upToDate = store.follow(5n, new AbortController().signal).next();
    await storeAll(chain("c", 1));
    expect((await upToDate).value).toMatchObject({ number: 6n });
  });
});

it.each(["/proc/kivimesh", "/etc/hostname/kivimesh"])("says that %s cannot be written", async (folder) => {
  await expect(open({ directory: folder })).rejects.toThrow(`data directory ${folder} cannot be written`);
});
