import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { createInterface } from "node:readline/promises";
import {
  blockChunks,
  Cachestore,
  collectBlock,
  collectBlocks,
  createClient,
  hex,
  localMembership,
  type RpcClient,
  serveGrpc,
  verifyBlock,
} from "@kivimesh/proto";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { StoredBlock } from "./block-store.ts";
import { type CachestoreServer, startCachestore } from "./cachestore.ts";
import { cachestoreService } from "./cachestore-service.ts";
import { cachestoreConfigFromEnvironment } from "./config.ts";
import { chain, idsOf, temporaryDirectory } from "./testing/sealed-blocks.ts";
import { openTieredStore } from "./tiered-store.ts";

type Client = RpcClient<typeof Cachestore>;
const MiB = 1024 * 1024;

let directory: string;
let server: CachestoreServer;
let client: Client;
const membership = localMembership();

beforeEach(async () => {
  directory = await temporaryDirectory();
  await start();
});

afterEach(async () => {
  client.close();
  await server.drain(1000);
  await rm(directory, { recursive: true, force: true });
});

async function start(): Promise<void> {
  server = await startCachestore({
    dataDirectory: directory,
    memoryBytes: 8 * MiB,
    diskBytes: 512 * MiB,
    metricsPort: 0,
    membership,
    id: "c1",
    logLevel: "silent",
  });
  client = createClient(Cachestore, server.address);
}

async function* upload(block: StoredBlock, chunkBytes?: number) {
  yield { part: { case: "header" as const, value: block.header } };
  for (const value of blockChunks(block.payload, chunkBytes)) {
    yield { part: { case: "chunk" as const, value } };
  }
}

async function storeAll(to: Client, blocks: readonly StoredBlock[]): Promise<void> {
  for (const block of blocks) {
    expect((await to.store(upload(block))).stored).toBe(true);
  }
}

async function fetchAll(ids: Uint8Array[]): Promise<StoredBlock[]> {
  const received: StoredBlock[] = [];
  for await (const block of collectBlocks(client.fetch({ blockIds: ids }))) {
    received.push(block);
  }
  return received;
}

describe("the service", () => {
  it("stores, looks up and fetches whole chains, byte for byte", async () => {
    const blocks = chain("a", 5, 2.5 * MiB);
    await storeAll(client, blocks);
    expect((await client.store(upload(blocks[0]!))).stored).toBe(false);
    const ids = idsOf(blocks);
    const { held, leaseId, leaseMs } = await client.lookup({ blockIds: [...ids, new Uint8Array(32)] });
    expect({ held, leaseMs }).toEqual({ held: 5, leaseMs: 10_000 });
    const received = await fetchAll(ids);
    expect(received.length).toBe(5);
    received.forEach((block, index) => {
      const { header, payload } = blocks[index]!;
      expect(Buffer.compare(block.payload, payload)).toBe(0);
      const { layers, kvHeads, headDim, blockTokens, residualTokens } = header;
      const shape = { layers, kvHeads, headDim, blockTokens, residualTokens };
      verifyBlock(block.header, block.payload, { ...header, shape });
    });
    expect((await client.stats({})).leases).toBe(1);
    await client.release({ leaseId });
    await client.release({ leaseId: "unknown" });
    expect(await client.stats({})).toMatchObject({ blocks: 5n, leases: 0, hits: 5n, misses: 1n, corrupt: 0n });
    expect(await server.checkIntegrity({ payloads: true })).toEqual([]);
  });

  it("says what is missing, and ends there", async () => {
    const blocks = chain("a", 4);
    await storeAll(client, [...blocks.slice(0, 2), blocks[3]!]);
    const cases: (string | undefined)[] = [];
    for await (const { part } of client.fetch({ blockIds: idsOf(blocks) })) {
      cases.push(part.case);
      if (part.case === "missing") {
        expect(hex(part.value)).toBe(hex(blocks[2]!.header.blockId));
      }
    }
    expect(cases).toEqual(["header", "chunk", "header", "chunk", "missing"]);
    await expect(collectBlock(client.fetch({ blockIds: [new Uint8Array(32)] }))).rejects.toMatchObject({
      code: "KV_BLOCK_NOT_FOUND",
    });
  });

  it("shows nothing of an upload that is cut, damaged or out of order", async () => {
    const [block] = chain("a", 1, 100_000);
    const { header, payload } = block!;
    const cut = async function* () {
      yield { part: { case: "header" as const, value: header } };
      yield { part: { case: "chunk" as const, value: payload.subarray(0, 99_999) } };
    };
    await expect(client.store(cut())).rejects.toMatchObject({ code: "KV_BLOCK_CORRUPT" });
    const stopped = async function* () {
      yield* cut();
      throw new Error("the worker died here");
    };
    await expect(client.store(stopped())).rejects.toThrow();
    const damaged = payload.slice();
    damaged[50_000]! ^= 1;
    await expect(client.store(upload({ header, payload: damaged }))).rejects.toMatchObject({
      code: "KV_BLOCK_CORRUPT",
    });
    const headless = async function* () {
      yield { part: { case: "chunk" as const, value: payload } };
    };
    await expect(client.store(headless())).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
    await expect(client.store((async function* () {})())).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
    expect((await client.lookup({ blockIds: [header.blockId] })).held).toBe(0);
    expect(server.stats()).toMatchObject({ blocks: 0, diskBytes: 0, memoryBytes: 0 });
    await storeAll(client, [block!]);
  });

  it("answers a second writer without reading its payload", async () => {
    const [block] = chain("a", 1, 4 * MiB);
    await storeAll(client, [block!]);
    let sent = 0;
    const slow = async function* () {
      for await (const part of upload(block!, 1000)) {
        sent++;
        yield part;
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    };
    expect((await client.store(slow())).stored).toBe(false);
    expect(sent).toBeLessThan(500);
  });

  it("gives the place of a stuck upload to others", async () => {
    const store = await openTieredStore({ directory: join(directory, "own"), memoryBytes: 0, diskBytes: 16 * MiB });
    const own = await serveGrpc({ port: 0, services: [cachestoreService(store, { uploadIdleMs: 200 })] });
    const impatient = createClient(Cachestore, own.address);
    const [block] = chain("a", 1);
    const stuck = async function* () {
      yield { part: { case: "header" as const, value: block!.header } };
      await new Promise((resolve) => setTimeout(resolve, 3_000));
    };
    const lost = Array.from({ length: 64 }, () =>
      expect(impatient.store(stuck())).rejects.toMatchObject({ code: "DEADLINE_EXCEEDED" }),
    );
    const last = impatient.store(stuck());
    await expect(last).rejects.toMatchObject({ code: "QUEUE_FULL", retryAfterMs: 500 });
    await Promise.all(lost);
    await storeAll(impatient, [block!]);
    impatient.close();
    await own.shutdown(100);
    await store.close();
  });

  it("bounds the bytes of all uploads under way, and takes more when they have ended", async () => {
    const store = await openTieredStore({ directory: join(directory, "own"), memoryBytes: 0, diskBytes: 16 * MiB });
    const own = await serveGrpc({ port: 0, services: [cachestoreService(store, { pendingUploadBytes: 25_000 })] });
    const uploader = createClient(Cachestore, own.address);
    const blocks = chain("a", 3);
    let resume = () => {};
    const gate = new Promise<void>((resolve) => {
      resume = resolve;
    });
    let started = 0;
    const paused = async function* (block: StoredBlock) {
      for await (const part of upload(block)) {
        yield part;
        if (part.part.case === "header") {
          started++;
          await gate;
        }
      }
    };
    const first = blocks.slice(0, 2).map((block) => uploader.store(paused(block)));
    await expect.poll(() => started).toBe(2);
    await new Promise((resolve) => setTimeout(resolve, 100));
    await expect(uploader.store(upload(blocks[2]!))).rejects.toMatchObject({ code: "STORE_FULL", retryAfterMs: 500 });
    resume();
    expect((await Promise.all(first)).map((answer) => answer.stored)).toEqual([true, true]);
    await storeAll(uploader, [blocks[2]!]);
    uploader.close();
    await own.shutdown(100);
    await store.close();
  });

  it("refuses ids that cannot be", async () => {
    const code = "INVALID_ARGUMENT";
    await expect(client.lookup({ blockIds: [new Uint8Array(31)] })).rejects.toMatchObject({ code });
    const many = Array.from({ length: 4097 }, () => new Uint8Array(32));
    await expect(client.pin({ blockIds: many, ttlMs: 1n })).rejects.toMatchObject({ code });
  });

  it("pins over a restart, and replays events over the wire", async () => {
    const blocks = chain("a", 2);
    const seen: string[] = [];
    const abort = new AbortController();
    const following = (async () => {
      for await (const event of client.events({ after: 0n }, { signal: abort.signal })) {
        seen.push(`${event.number} ${event.event.case}`);
      }
    })();
    const ended = expect(following).rejects.toMatchObject({ code: "CANCELLED" });
    await new Promise((resolve) => setTimeout(resolve, 200));
    await storeAll(client, blocks);
    await expect.poll(() => seen).toEqual(["1 stored", "2 stored"]);
    abort.abort();
    await ended;
    for await (const event of client.events({ after: 1n })) {
      expect(event.number).toBe(2n);
      break;
    }
    expect((await client.pin({ blockIds: idsOf(blocks), ttlMs: 60_000n })).pinned).toBe(2);
    client.close();
    await server.drain(1000);
    await start();
    expect((await fetchAll(idsOf(blocks))).length).toBe(2);
    for await (const event of client.events({ after: 1n })) {
      expect(event.event.case).toBe("cleared");
      break;
    }
  });

  it("moves blocks at a useful rate", async () => {
    const blocks = chain("big", 48, 2 * MiB);
    const bytes = 48 * 2 * MiB;
    // Against the processor's time, not the wall's: both ends run here, and other things run beside them.
    const measured = async (name: string, action: () => Promise<void>): Promise<number> => {
      const [before, wallBefore] = [process.cpuUsage(), performance.now()];
      await action();
      const { user, system } = process.cpuUsage(before);
      const rates = [user + system, (performance.now() - wallBefore) * 1000].map((us) => Math.round(bytes / us));
      console.log(`${name}: ${rates[0]} MB for each second of CPU of both ends together, ${rates[1]} MB/s`);
      return rates[0]!;
    };
    const stored = await measured("store", async () => {
      for (let start = 0; start < blocks.length; start += 8) {
        await Promise.all(blocks.slice(start, start + 8).map((block) => client.store(upload(block))));
      }
    });
    const fetched = await measured("fetch, mostly from disk", async () => {
      expect((await fetchAll(idsOf(blocks))).length).toBe(48);
    });
    expect(Math.min(stored, fetched)).toBeGreaterThan(20);
  });
});

describe("the process", () => {
  it("announces itself, serves probes and metrics, and leaves in order", async () => {
    expect(await membership.list("cachestore")).toEqual([{ id: "c1", role: "cachestore", address: server.address }]);
    await storeAll(client, chain("a", 2));
    const text = await (await fetch(`${server.metricsUrl}/metrics`)).text();
    expect(text).toContain("kivimesh_cachestore_blocks 2");
    expect(text).toContain('kivimesh_cachestore_payload_bytes_total{direction="stored"} 20000');
    expect((await fetch(`${server.metricsUrl}/readyz`)).status).toBe(200);
    const before = performance.now();
    await Promise.all([server.drain(500), server.drain(500)]);
    expect(performance.now() - before).toBeLessThan(2_000);
    expect(await membership.list("cachestore")).toEqual([]);
    await expect(client.stats({})).rejects.toMatchObject({ code: "UNAVAILABLE" });
  });

  it("gives back what it opened when it cannot start", async () => {
    const port = Number(server.address.split(":").at(-1));
    const other = join(directory, "other");
    await expect(startCachestore({ dataDirectory: other, port, logLevel: "silent" })).rejects.toThrow();
    const open = { dataDirectory: other, host: "0.0.0.0", logLevel: "silent" as const };
    await expect(startCachestore(open)).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
    const again = await startCachestore({ dataDirectory: other, logLevel: "silent" });
    await again.drain(0);
  });

  it("keeps every acknowledged block, and no half ones, when it is killed while it stores", async () => {
    const own = await temporaryDirectory();
    const acknowledged: StoredBlock[] = [];
    const blocks = Array.from({ length: 12 }, (_, index) => chain(`k${index}`, 20, 300_000)).flat();
    for (let round = 0; round < 3; round++) {
      const { child, address } = await spawnCachestore(own);
      const victim = createClient(Cachestore, address);
      const mine = blocks.slice(round * 80, round * 80 + 80);
      const lane = async (blocks: StoredBlock[]) => {
        for (const block of blocks) {
          await victim.store(upload(block, 50_000));
          acknowledged.push(block);
        }
      };
      const storing = Promise.allSettled([0, 20, 40, 60].map((start) => lane(mine.slice(start, start + 20))));
      const target = acknowledged.length + 10 + round * 15;
      await expect.poll(() => acknowledged.length, { interval: 1, timeout: 30_000 }).toBeGreaterThan(target);
      child.kill("SIGKILL");
      await once(child, "exit");
      expect((await storing).map((result) => result.status)).toContain("rejected");
      victim.close();
    }
    const survivor = await startCachestore({ dataDirectory: own, logLevel: "silent" });
    const reader = createClient(Cachestore, survivor.address);
    expect(await survivor.checkIntegrity({ payloads: true })).toEqual([]);
    expect(survivor.stats().corrupt).toBe(0);
    expect(survivor.stats().blocks).toBeGreaterThanOrEqual(acknowledged.length);
    for (const { header, payload } of acknowledged) {
      const back = await collectBlock(reader.fetch({ blockIds: [header.blockId] }));
      expect(Buffer.compare(back.payload, payload)).toBe(0);
    }
    reader.close();
    await survivor.drain(0);
    await rm(own, { recursive: true, force: true });
  });
});

describe("cachestoreConfigFromEnvironment", () => {
  it("reads what is set, and names what is wrong", () => {
    const environment = { KIVIMESH_DATA_DIRECTORY: "/d", KIVIMESH_PORT: "7000", KIVIMESH_MEMORY_BYTES: "0", HOME: "/" };
    expect(cachestoreConfigFromEnvironment(environment)).toEqual({ dataDirectory: "/d", port: 7000, memoryBytes: 0 });
    expect(() => cachestoreConfigFromEnvironment({})).toThrow(/KIVIMESH_DATA_DIRECTORY/);
    expect(() => cachestoreConfigFromEnvironment({ ...environment, KIVIMESH_PORT: "70000" })).toThrow(/KIVIMESH_PORT/);
    expect(() => cachestoreConfigFromEnvironment({ ...environment, KIVIMESH_DISK_BYTES: "x" })).toThrow(/DISK_BYTES/);
  });
});

async function spawnCachestore(dataDirectory: string): Promise<{ child: ChildProcess; address: string }> {
  const script = join(import.meta.dirname, "testing/cachestore-process.ts");
  const child = spawn(
    process.execPath,
    ["--conditions=source", "--import", "tsx", script, dataDirectory, String(1024 * MiB)],
    { stdio: ["ignore", "pipe", "inherit"] },
  );
  const lines = createInterface({ input: child.stdout! });
  const [address] = (await once(lines, "line")) as [string];
  return { child, address };
}
