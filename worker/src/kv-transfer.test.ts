import { randomBytes } from "node:crypto";
import { kvFormat } from "@kivimesh/kernels";
import {
  blockChunks,
  Cachestore,
  createLogger,
  describeBlock,
  type GrpcServer,
  hex,
  implementService,
  type KvBlockHeader,
  serveGrpc,
} from "@kivimesh/proto";
import { afterEach, describe, expect, it } from "vitest";
import type { FetchReport } from "./block-transfer.ts";
import { CachestoreLink } from "./cachestore-link.ts";
import { KvTransfer } from "./kv-transfer.ts";

const kv = {
  format: kvFormat("kivi2"),
  formatId: kvFormat("kivi2").id,
  layers: 2,
  kvHeads: 2,
  headDim: 32,
  blockTokens: 32,
  residualTokens: 32,
  blockBytes: 3072,
  bitsPerElement: 3,
  f16BytesPerToken: 512,
};
const modelDigest = new Uint8Array(randomBytes(32));
const root = new Uint8Array(randomBytes(32));

interface StoredBlock {
  header: KvBlockHeader;
  payload: Uint8Array;
}

function chain(length: number, change: Partial<Parameters<typeof describeBlock>[0]> = {}): StoredBlock[] {
  const { layers, kvHeads, headDim, blockTokens, residualTokens, formatId, blockBytes } = kv;
  let parentId = root;
  return Array.from({ length }, () => {
    const payload = new Uint8Array(randomBytes(blockBytes));
    const blockId = new Uint8Array(randomBytes(32));
    const shape = { layers, kvHeads, headDim, blockTokens, residualTokens };
    const provenance = "prefill" as const;
    const header = describeBlock({ formatId, modelDigest, blockId, parentId, shape, provenance, payload, ...change });
    parentId = blockId;
    return { header, payload };
  });
}

/** A cachestore on a real connection that lies, stalls or breaks off as told. */
class FaultyStore {
  blocks: StoredBlock[] = [];
  readonly stored: StoredBlock["payload"][] = [];
  leases = 0;
  lookups = 0;
  /** Ends the fetch with an error before this block. */
  breakBefore = Number.POSITIVE_INFINITY;
  stallLookup = false;
  server: GrpcServer | undefined;

  async open(): Promise<string> {
    this.server = await serveGrpc({
      port: 0,
      services: [this.#service()],
      reflection: false,
      onInternalError: () => undefined,
    });
    return this.server.address;
  }

  #service() {
    const store = this;
    return implementService(Cachestore, {
      async lookup({ blockIds }, { signal }) {
        store.lookups += 1;
        if (store.stallLookup) await new Promise((resolve) => signal.addEventListener("abort", resolve));
        const ids = new Set(store.blocks.map(({ header }) => hex(header.blockId)));
        const missing = blockIds.findIndex((id) => !ids.has(hex(id)));
        const held = missing < 0 ? blockIds.length : missing;
        if (held > 0) store.leases += 1;
        return { held, leaseId: held > 0 ? "lease" : "", leaseMs: 1000 };
      },
      async *fetch({ blockIds }) {
        for (const [index, id] of blockIds.entries()) {
          if (index >= store.breakBefore) throw new Error("broken off");
          const block = store.blocks.find(({ header }) => hex(header.blockId) === hex(id))!;
          yield { part: { case: "header" as const, value: block.header } };
          for (const value of blockChunks(block.payload, 1000)) yield { part: { case: "chunk" as const, value } };
        }
      },
      async store(requests) {
        const chunks: Uint8Array[] = [];
        for await (const { part } of requests) if (part.case === "chunk") chunks.push(part.value);
        store.stored.push(new Uint8Array(Buffer.concat(chunks)));
        return { stored: true };
      },
      async release() {
        store.leases -= 1;
        return {};
      },
      async pin() {
        return {};
      },
      async stats() {
        return {};
      },
      async *events() {},
    });
  }
}

describe("KvTransfer", () => {
  const closers: (() => unknown)[] = [];

  afterEach(async () => {
    for (const close of closers.splice(0)) await close();
  });

  async function connect(
    store: FaultyStore,
    readBlock: (id: string) => Promise<Uint8Array | undefined> = async () => undefined,
  ) {
    const link = new CachestoreLink();
    link.setAddress(await store.open());
    const logger = createLogger("test", "silent");
    const transfer = new KvTransfer({ link, identity: { modelDigest, kv, numerics: "invariant" }, logger, readBlock });
    closers.push(
      () => transfer.close(),
      () => store.server?.shutdown(0),
    );
    return transfer;
  }

  async function fetchAll(transfer: KvTransfer, blocks: StoredBlock[]): Promise<Uint8Array[]> {
    const taken: Uint8Array[] = [];
    const ids = blocks.map(({ header }) => hex(header.blockId));
    const report = await new Promise<FetchReport>((resolve) => {
      const sink = {
        block: (_: number, id: string, payload: Uint8Array) => {
          expect(id).toBe(ids[taken.length]);
          taken.push(payload);
        },
        ended: (_: number, end: FetchReport) => resolve(end),
      };
      transfer.fetch({ fetchId: 1, ids, parentId: hex(root) }, sink);
    });
    expect(report.bytes).toBe(taken.reduce((sum, payload) => sum + payload.length, 0));
    return taken;
  }

  it("fetches a chain under a lease and gives the lease back", async () => {
    const store = new FaultyStore();
    const transfer = await connect(store);
    store.blocks = chain(5);
    const taken = await fetchAll(transfer, store.blocks);
    expect(taken.map(hex)).toEqual(store.blocks.map(({ payload }) => hex(payload)));
    expect(transfer.counters).toMatchObject({ fetchedBlocks: 5, fetchedBytes: 5 * kv.blockBytes, rejectedBlocks: 0 });
    await expect.poll(() => [store.leases, transfer.counters.heldLeases]).toEqual([0, 0]);
  });

  const spoil: Record<string, (blocks: StoredBlock[]) => void> = {
    "a flipped bit": ([, , bad]) => {
      bad!.payload[1234]! ^= 4;
    },
    "a payload that is too short": ([, , bad]) => {
      bad!.payload = bad!.payload.slice(0, 3000);
    },
    "another parent": ([, , bad]) => {
      bad!.header.parentId = new Uint8Array(randomBytes(32));
    },
    "another model's digest": ([, , bad]) => {
      bad!.header.modelDigest = new Uint8Array(randomBytes(32));
    },
    "another format": ([, , bad]) => {
      bad!.header.formatId = kvFormat("kivi4").id;
    },
    "another R": ([, , bad]) => {
      bad!.header.residualTokens = 64;
    },
    "another payload with a header that fits it": (blocks) => {
      blocks[2]!.header.crc32 = blocks[3]!.header.crc32;
    },
  };

  for (const [name, change] of Object.entries(spoil)) {
    it(`takes the blocks before one with ${name}, counts it, and gives the lease back`, async () => {
      const store = new FaultyStore();
      const transfer = await connect(store);
      store.blocks = chain(4);
      change(store.blocks);
      expect(await fetchAll(transfer, store.blocks)).toHaveLength(2);
      expect(transfer.counters.rejectedBlocks).toBe(1);
      await expect.poll(() => [store.leases, transfer.counters.heldLeases]).toEqual([0, 0]);
      // A bad block is no reason to leave the store alone.
      store.blocks = chain(2);
      expect(await fetchAll(transfer, store.blocks)).toHaveLength(2);
    });
  }

  it("takes no blocks that decode rows sealed", async () => {
    const store = new FaultyStore();
    const transfer = await connect(store);
    store.blocks = chain(2, { provenance: "decode" });
    expect(await fetchAll(transfer, store.blocks)).toEqual([]);
  });

  it("keeps what came before the connection broke, and leaves the store alone for a while", async () => {
    const store = new FaultyStore();
    const transfer = await connect(store);
    store.blocks = chain(4);
    store.breakBefore = 1;
    expect(await fetchAll(transfer, store.blocks)).toHaveLength(1);
    expect(transfer.counters.failedFetches).toBe(1);
    expect(await fetchAll(transfer, store.blocks)).toEqual([]);
    expect(store.lookups).toBe(1);
  });

  it("does not wait for a store that does not answer", async () => {
    const store = new FaultyStore();
    const transfer = await connect(store);
    store.blocks = chain(1);
    store.stallLookup = true;
    const started = performance.now();
    expect(await fetchAll(transfer, store.blocks)).toEqual([]);
    expect(performance.now() - started).toBeLessThan(3_000);
    expect(transfer.counters.failedFetches).toBe(1);
  });

  it("answers at once without a store", async () => {
    const transfer = new KvTransfer({
      link: new CachestoreLink(),
      identity: { modelDigest, kv, numerics: "invariant" },
      logger: createLogger("test", "silent"),
      readBlock: async () => undefined,
    });
    expect(await fetchAll(transfer, chain(2))).toEqual([]);
  });

  it("publishes what the store lacks, and counts what is gone from the pool", async () => {
    const store = new FaultyStore();
    const blocks = chain(4);
    const gone = hex(blocks[3]!.header.blockId);
    const payloads = new Map(blocks.map(({ header, payload }) => [hex(header.blockId), payload]));
    const transfer = await connect(store, async (id) => (id === gone ? undefined : payloads.get(id)));
    store.blocks = blocks.slice(0, 1);
    const sealed = blocks.map(({ header }) => ({
      id: hex(header.blockId),
      parentId: hex(header.parentId),
      provenance: "prefill" as const,
    }));
    transfer.sealed(sealed);
    expect(await transfer.flush(5_000)).toBe(true);
    expect(store.stored.map(hex)).toEqual(blocks.slice(1, 3).map(({ payload }) => hex(payload)));
    expect(transfer.counters).toMatchObject({ publishedBlocks: 2, droppedPublishes: 1 });
    expect(store.leases).toBe(0);
  });

  it("drops what it cannot store, and counts it", async () => {
    const store = new FaultyStore();
    const transfer = await connect(store, async () => new Uint8Array(kv.blockBytes));
    await store.server!.shutdown(0);
    const ids = Array.from({ length: 5000 }, () => hex(randomBytes(32)));
    transfer.sealed(ids.map((id) => ({ id, parentId: hex(root), provenance: "prefill" as const })));
    expect(await transfer.flush(10_000)).toBe(true);
    expect(transfer.counters).toMatchObject({ publishedBlocks: 0, droppedPublishes: 5000 });
  });
});
