/**
 * Prefix reuse between workers in separate processes, over a real Redis and a real cachestore: a hit is counted, is
 * reported by source, moves exactly the blocks' bytes, and changes nothing in the answer.
 */
import { blockIds, chainRoot, tenantNamespace } from "@kivimesh/proto";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type CachestoreHandle, Cluster, type GatewayHandle, until, type WorkerHandle } from "./cluster.ts";
import { englishPrompt, type Generation, generate } from "./generation.ts";

const SHARED_TOKENS = 256;

describe("prefix reuse between workers", () => {
  let cluster: Cluster;
  let cachestore: CachestoreHandle;
  let gateway: GatewayHandle;
  let a: WorkerHandle;
  let b: WorkerHandle;
  let first: Generation;
  let reused: Generation;
  const shared = englishPrompt(1, 300);
  const question = `${shared}\n\nIn one sentence, what did the keeper write down?`;

  beforeAll(async () => {
    cluster = await Cluster.start();
    cachestore = await cluster.cachestore();
    a = await cluster.worker("a", cachestore.address);
    b = await cluster.worker("b", cachestore.address);
    gateway = await cluster.gateway();
    await until("both workers at the gateway", async () => (await metric(gateway, "kivimesh_gateway_workers")) >= 2);
  }, 300_000);

  afterAll(async () => {
    await cluster[Symbol.asyncDispose]();
  });

  it("computes and publishes a prompt on worker A", async () => {
    first = await generate(gateway, shared, { workerId: "a" });
    expect(first.usage.kivimesh?.worker).toBe("a");
    expect(first.usage.promptTokens).toBeGreaterThanOrEqual(300);
    expect(first.usage.kivimesh?.promptTokensBySource?.computed).toBe(first.usage.promptTokens);
    await until("published blocks", async () => (await cachestore.rpc.stats({})).blocks >= 2n);
  });

  it("takes the shared blocks from the cachestore on worker B and computes only the rest", async () => {
    reused = await generate(gateway, question, { workerId: "b" });
    const usage = reused.usage.kivimesh;
    expect(usage?.worker).toBe("b");
    expect(reused.usage.cachedTokens).toBeGreaterThanOrEqual(SHARED_TOKENS);
    expect(usage?.promptTokensBySource?.cachestore).toBe(reused.usage.cachedTokens);
    expect(usage?.promptTokensBySource?.computed).toBe(reused.usage.promptTokens - reused.usage.cachedTokens);
    const model = await b.rpc.getModel({});
    const blocks = BigInt(reused.usage.cachedTokens / model.blockTokens);
    expect(usage?.fetchedBytes).toBe(blocks * model.blockBytes);
    expect(usage?.fetchedBytes).toBeGreaterThan(0n);
    expect((await b.rpc.getStats({})).fetchedBytes).toBe(usage?.fetchedBytes);
  });

  it("keeps the same bytes in A's GPU pool and in the cachestore", async () => {
    const model = await a.rpc.getModel({});
    const { ids } = await gateway.rpc.tokenize({ input: { case: "text", value: shared } });
    const root = chainRoot({
      modelDigest: model.digest,
      formatId: model.kvFormatId,
      blockTokens: model.blockTokens,
      residualTokens: model.residualTokens,
      tenantNamespace: tenantNamespace("kivimesh-local", "default"),
    });
    const chain = blockIds(root, ids, model.blockTokens).slice(0, 2);
    expect(chain).toHaveLength(2);
    for (const blockId of chain) {
      const pool: Uint8Array[] = [];
      for await (const { chunk } of a.rpc.readBlock({ blockId })) pool.push(chunk);
      const stored: Uint8Array[] = [];
      for await (const { part } of cachestore.rpc.fetch({ blockIds: [blockId] })) {
        if (part.case === "chunk") stored.push(part.value);
      }
      expect(BigInt(Buffer.concat(pool).length)).toBe(model.blockBytes);
      expect(Buffer.concat(stored).equals(Buffer.concat(pool))).toBe(true);
    }
  });

  it("answers from the GPU pool the second time, with the same bits", async () => {
    const again = await generate(gateway, question, { workerId: "b" });
    expect(again.usage.kivimesh?.promptTokensBySource?.gpu).toBe(reused.usage.cachedTokens);
    expectSameAnswer(again, reused);
  });

  it("gives the same bits on a worker B that never saw the prefix (hit = miss)", async () => {
    await using empty = await Cluster.start();
    const emptyStore = await empty.cachestore();
    await empty.worker("b", emptyStore.address);
    const miss = await generate(await empty.gateway(), question, { workerId: "b" });
    expect(miss.usage.cachedTokens).toBe(0);
    expectSameAnswer(reused, miss);
  });

  it("does not depend on what else is in the batch", async () => {
    // Salts keep the two runs from sharing blocks: the second would else be a prefix hit of the first.
    const prompt = englishPrompt(50, 150);
    const alone = await generate(gateway, prompt, { workerId: "a", maxTokens: 24, cacheSalt: "alone" });
    const others = [51, 52, 53].map((seed) =>
      generate(gateway, englishPrompt(seed, 40 * (seed - 50)), { workerId: "a", maxTokens: 96, cacheSalt: "batch" }),
    );
    const inBatch = generate(gateway, prompt, { workerId: "a", maxTokens: 24, cacheSalt: "batch" });
    await until("four sequences that run together", async () => (await a.rpc.getStats({})).runningSequences === 4);
    expect((await inBatch).usage.cachedTokens).toBe(0);
    expectSameAnswer(await inBatch, alone);
    await Promise.all(others);
  });
});

function expectSameAnswer(actual: Generation, expected: Generation): void {
  expect(Buffer.compare(actual.firstLogits, expected.firstLogits)).toBe(0);
  expect(actual.tokenIds).toEqual(expected.tokenIds);
  expect(actual.text).toBe(expected.text);
}

async function metric(from: GatewayHandle, name: string): Promise<number> {
  const text = await (await fetch(`${from.httpUrl}/metrics`)).text();
  return Number(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, "m").exec(text)?.[1] ?? 0);
}
