import { Counter, Gauge, Histogram, type Registry } from "prom-client";
import type { BlockStore } from "./block-store.ts";

const secondsBuckets = [0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1];

/** The same store, with what it does measured in `registry`. */
export function instrumentedStore(store: BlockStore, registry: Registry): BlockStore {
  const registers = [registry];
  const moved = new Counter({
    name: "kivimesh_cachestore_payload_bytes_total",
    help: "Payload bytes handed out (fetched) and taken in (stored).",
    labelNames: ["direction"],
    registers,
  });
  const seconds = new Histogram({
    name: "kivimesh_cachestore_operation_seconds",
    help: "Time of one operation on one block, without the network.",
    labelNames: ["operation"],
    buckets: secondsBuckets,
    registers,
  });
  gauges(store, registers);
  return {
    lookup: (blockIds, leaseMs) => store.lookup(blockIds, leaseMs),
    has: (blockId) => store.has(blockId),
    release: (leaseId) => store.release(leaseId),
    pin: (blockIds, ttlMs) => store.pin(blockIds, ttlMs),
    stats: () => store.stats(),
    follow: (after, signal) => store.follow(after, signal),
    checkIntegrity: (options) => store.checkIntegrity(options),
    close: () => store.close(),
    async fetch(blockId) {
      const end = seconds.startTimer({ operation: "fetch" });
      const block = await store.fetch(blockId);
      end();
      moved.inc({ direction: "fetched" }, block?.payload.length ?? 0);
      return block;
    },
    async store(block) {
      const end = seconds.startTimer({ operation: "store" });
      const stored = await store.store(block);
      end();
      moved.inc({ direction: "stored" }, stored ? block.payload.length : 0);
      return stored;
    },
  };
}

/** The store's own numbers, read when they are scraped. */
function gauges(store: BlockStore, registers: Registry[]): void {
  const gauge = (name: string, help: string, read: () => number) => {
    new Gauge({
      name: `kivimesh_cachestore_${name}`,
      help,
      registers,
      collect() {
        this.set(read());
      },
    });
  };
  const total = (name: string, help: string, read: () => number) => {
    new Counter({
      name: `kivimesh_cachestore_${name}_total`,
      help,
      registers,
      collect() {
        this.reset();
        this.inc(read());
      },
    });
  };
  gauge("blocks", "Blocks held.", () => store.stats().blocks);
  gauge("memory_bytes", "Payload bytes in the memory tier.", () => store.stats().memoryBytes);
  gauge("memory_limit_bytes", "Limit of the memory tier.", () => store.stats().memoryLimitBytes);
  gauge("disk_bytes", "Bytes of blocks on disk.", () => store.stats().diskBytes);
  gauge("disk_limit_bytes", "Limit of the disk tier.", () => store.stats().diskLimitBytes);
  gauge("leases", "Leases that run.", () => store.stats().leases);
  total("hits", "Blocks that lookups found.", () => store.stats().hits);
  total("misses", "Blocks that lookups and fetches did not find.", () => store.stats().misses);
  total("corrupt", "Blocks dropped because they failed their checks.", () => store.stats().corrupt);
  total("evicted", "Blocks evicted to make room.", () => store.stats().evicted);
}
