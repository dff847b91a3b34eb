/** What users see when parts fail: nothing wrong is ever served, and nothing leaks. */
import { readdir, readFile, writeFile } from "node:fs/promises";
import { connect, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { Cachestore, implementService, serveGrpc } from "@kivimesh/proto";
import { Queue } from "bullmq";
import { Redis } from "ioredis";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type CachestoreHandle, Cluster, type GatewayHandle, until, type WorkerHandle } from "./cluster.ts";
import { englishPrompt, type Generation, generate } from "./generation.ts";

/** Less than one block of the test model. */
const KILL_AFTER_BYTES = 64 * 1024;

describe("faults around the cachestore", () => {
  let cluster: Cluster;
  let cachestore: CachestoreHandle;
  let gateway: GatewayHandle;
  let writer: WorkerHandle;
  let right: Generation;
  const prompt = englishPrompt(3, 300);

  beforeAll(async () => {
    cluster = await Cluster.start();
    cachestore = await cluster.cachestore();
    writer = await cluster.worker("writer", cachestore.address);
    gateway = await cluster.gateway();
    right = await generate(gateway, prompt, { workerId: writer.id });
    await until("published blocks", async () => (await cachestore.rpc.stats({})).blocks >= 2n);
  }, 300_000);

  afterAll(async () => {
    await cluster[Symbol.asyncDispose]();
  });

  it("counts a bit flipped in transit, drops the block and its successors, and answers right", async () => {
    await using proxy = await bitFlippingProxy(cachestore);
    const reader = await cluster.worker("reader-transit", proxy.address);
    await atGateway(gateway, 2);
    const answer = await generate(gateway, prompt, { workerId: reader.id });
    expect(answer.usage.kivimesh?.promptTokensBySource?.cachestore).toBe(0);
    expect((await reader.rpc.getStats({})).rejectedBlocks).toBeGreaterThan(0n);
    expectSame(answer, right);
    await reader.process.stop();
  });

  it("counts a bit flipped on disk as a miss and answers right", async () => {
    await cachestore.process.stop("SIGKILL");
    expect(await flipPayloadBits(cachestore.dataDirectory)).toBeGreaterThan(0);
    cachestore = await cluster.cachestore({ dataDirectory: cachestore.dataDirectory });
    const reader = await cluster.worker("reader-disk", cachestore.address);
    await atGateway(gateway, 2);
    const answer = await generate(gateway, prompt, { workerId: reader.id });
    expect(answer.usage.kivimesh?.promptTokensBySource?.cachestore).toBe(0);
    expect((await cachestore.rpc.stats({})).corrupt).toBeGreaterThan(0n);
    expectSame(answer, right);
    await reader.process.stop();
  });

  it("recomputes when the cachestore is killed during fetches", async () => {
    const store = await cluster.cachestore();
    const source = await cluster.worker("source", store.address);
    await atGateway(gateway, 2);
    await generate(gateway, prompt, { workerId: source.id, maxTokens: 1 });
    await until("published blocks", async () => (await store.rpc.stats({})).blocks >= 2n);
    await using wire = await killingWire(store);
    const reader = await cluster.worker("reader-kill", wire.address);
    await atGateway(gateway, 3);
    const answer = await generate(gateway, prompt, { workerId: reader.id });
    await until("the end of the cachestore", () => !store.process.running);
    expect(wire.forwardedBytes()).toBeGreaterThan(KILL_AFTER_BYTES);
    expect(answer.usage.kivimesh?.promptTokensBySource?.cachestore).toBe(0);
    expectSame(answer, right);
    await Promise.all([reader.process.stop(), source.process.stop()]);
  });

  it("releases pages, jobs and leases when the client goes away", async () => {
    const abort = new AbortController();
    const gone = generate(gateway, englishPrompt(9, 200), {
      workerId: writer.id,
      maxTokens: 512,
      signal: abort.signal,
      onDelta: () => abort.abort(),
    });
    await expect(gone).rejects.toThrow();
    await until("everything at zero", async () => {
      const stats = await writer.rpc.getStats({});
      return stats.referencedPages + stats.runningSequences + stats.heldLeases + stats.activeJobs === 0;
    });
    expect((await writer.rpc.getStats({})).integrityViolations).toEqual([]);
    const queue = new Queue(`kivimesh-worker-${writer.id}`, { connection: { url: cluster.redis.url } });
    await until("no job in Redis", async () => (await queue.getActiveCount()) + (await queue.getWaitingCount()) === 0);
    await queue.close();
    const redis = new Redis(cluster.redis.url);
    expect(await redis.keys("*:lock")).toEqual([]);
    await redis.quit();
  });

  it("ends each role with exit code 0 within 5 s of SIGTERM", async () => {
    for (const { process } of [writer, gateway, cachestore]) {
      const started = Date.now();
      expect(await process.stop("SIGTERM"), process.output).toBe(0);
      expect(Date.now() - started, process.name).toBeLessThan(5_000);
    }
  });
});

async function atGateway(gateway: GatewayHandle, workers: number): Promise<void> {
  await until(`${workers} workers at the gateway`, async () => {
    const text = await (await fetch(`${gateway.httpUrl}/metrics`)).text();
    return Number(/^kivimesh_gateway_workers(?:\{[^}]*\})? (\S+)$/m.exec(text)?.[1] ?? 0) >= workers;
  });
}

function expectSame(actual: Generation, expected: Generation): void {
  expect(Buffer.compare(actual.firstLogits, expected.firstLogits)).toBe(0);
  expect(actual.text).toBe(expected.text);
}

/** Forwards to a cachestore; hooks see each fetched chunk. */
async function cachestoreProxy(upstream: CachestoreHandle, onChunk: (chunk: Uint8Array) => Promise<Uint8Array>) {
  const server = await serveGrpc({
    host: "127.0.0.1",
    port: 0,
    services: [
      implementService(Cachestore, {
        lookup: (request) => upstream.rpc.lookup(request),
        async *fetch(request) {
          for await (const response of upstream.rpc.fetch(request)) {
            if (response.part.case === "chunk") {
              yield { part: { case: "chunk", value: await onChunk(response.part.value) } };
            } else yield response;
          }
        },
        store: (requests) => upstream.rpc.store(requests),
        release: (request) => upstream.rpc.release(request),
        pin: (request) => upstream.rpc.pin(request),
        stats: (request) => upstream.rpc.stats(request),
        events: (request) => upstream.rpc.events(request),
      }),
    ],
  });
  return { address: `127.0.0.1:${server.port}`, [Symbol.asyncDispose]: () => server.shutdown(0) };
}

async function bitFlippingProxy(upstream: CachestoreHandle) {
  return cachestoreProxy(upstream, async (chunk) => {
    const flipped = Uint8Array.from(chunk);
    flipped[100] = (flipped[100] ?? 0) ^ 0x10;
    return flipped;
  });
}

/** A wire to the cachestore that kills it, and so is cut, in the middle of the first block that comes through. */
async function killingWire(upstream: CachestoreHandle) {
  let forwarded = 0;
  const sockets = new Set<Socket>();
  const [host, port] = upstream.address.split(":");
  const server = createServer((client) => {
    const store = connect(Number(port), host);
    for (const socket of [client, store]) {
      sockets.add(socket);
      socket.on("error", () => socket.destroy());
      socket.on("close", () => {
        client.destroy();
        store.destroy();
      });
    }
    client.pipe(store);
    store.on("data", (bytes) => {
      forwarded += bytes.length;
      if (forwarded <= KILL_AFTER_BYTES) {
        client.write(bytes);
        return;
      }
      // What the dead process had already handed to the kernel must not arrive either: a whole block might be in it.
      upstream.process.child.kill("SIGKILL");
      client.destroy();
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  if (address === null || typeof address === "string") throw new Error("no port");
  return {
    address: `127.0.0.1:${address.port}`,
    forwardedBytes: () => forwarded,
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** Flips one bit in each LMDB overflow page that looks like payload. @returns how many bits were flipped. */
async function flipPayloadBits(dataDirectory: string): Promise<number> {
  let flipped = 0;
  for (const name of await readdir(dataDirectory, { recursive: true })) {
    if (!name.endsWith(".mdb") || name.endsWith("lock.mdb")) continue;
    const path = join(dataDirectory, name);
    const data = await readFile(path);
    // Large values lie in runs of pages without tree headers; a stride of 64 KiB from there hits every payload.
    for (let offset = 64 * 1024; offset < data.length; offset += 64 * 1024) {
      if (data.subarray(offset - 64, offset + 64).filter((byte) => byte !== 0).length < 64) continue;
      data[offset] = (data[offset] ?? 0) ^ 1;
      flipped += 1;
    }
    await writeFile(path, data);
  }
  return flipped;
}
