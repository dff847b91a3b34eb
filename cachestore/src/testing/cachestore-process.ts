// A cachestore as a process of its own, for tests that kill it: `cachestore-process.ts DIRECTORY DISK_BYTES`.
// Prints its address on one line.
import { startCachestore } from "../cachestore.ts";

const [dataDirectory, diskBytes] = process.argv.slice(2);
if (dataDirectory === undefined) {
  throw new Error("give a data directory");
}
const server = await startCachestore({ dataDirectory, diskBytes: Number(diskBytes), logLevel: "warn" });
process.stdout.write(`${server.address}\n`);
