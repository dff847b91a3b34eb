import { randomUUID } from "node:crypto";
import { mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { promisify } from "node:util";
import { gunzip } from "node:zlib";
import { LATEST_SCHEMA_VERSION } from "bullmq";
import type { Logger } from "./logging.ts";
import { openPglitePool, type PglitePool } from "./pglite-pool.ts";

const unpack = promisify<Uint8Array, Buffer>(gunzip);

/**
 * An in-memory database that starts from a prepared one kept in `directory`, where making one costs seconds. `prepare`
 * brings any database up to date. A template that cannot be read or written only costs time.
 */
export async function openFromTemplate(
  directory: string,
  prepare: (pool: PglitePool) => Promise<void>,
  logger: Logger,
): Promise<PglitePool> {
  const path = join(directory, templateName());
  const loaded = await load(path, prepare, logger);
  if (loaded !== undefined) {
    return loaded;
  }
  const pool = await openPglitePool();
  await prepare(pool);
  try {
    await save(path, directory, await pool.dump());
  } catch (error) {
    logger.warn({ err: error, path }, "could not keep the prepared queue database; the next start is as slow");
  }
  return pool;
}

async function load(
  path: string,
  prepare: (pool: PglitePool) => Promise<void>,
  logger: Logger,
): Promise<PglitePool | undefined> {
  let bytes: Buffer;
  try {
    bytes = await readFile(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") {
      logger.warn({ err: error, path }, "cannot read the prepared queue database");
    }
    return undefined;
  }
  try {
    // Unpacked here: PGlite's own unpacking of a damaged file ends in a rejection that nobody can catch.
    const archive = new Uint8Array(await unpack(bytes));
    const pool = await openPglitePool({ dump: new Blob([archive], { type: "application/x-tar" }) });
    await prepare(pool);
    return pool;
  } catch (error) {
    logger.warn({ err: error, path }, "the prepared queue database is damaged; making a new one");
    await rm(path, { force: true });
    return undefined;
  }
}

/** Whole or not at all, also when several processes start at once. */
async function save(path: string, directory: string, dump: Blob): Promise<void> {
  await mkdir(directory, { recursive: true });
  const partial = join(directory, `${randomUUID()}.partial`);
  await writeFile(partial, new Uint8Array(await dump.arrayBuffer()));
  await rename(partial, path);
}

/** Another version of either side gets a template of its own. */
function templateName(): string {
  const require = createRequire(import.meta.url);
  // The package exports no manifest, so it is found beside its entry, in dist.
  const manifest = join(dirname(require.resolve("@electric-sql/pglite")), "../package.json");
  const { version } = require(manifest) as { version: string };
  return `queue-pglite-${version}-bullmq-${LATEST_SCHEMA_VERSION}.tar.gz`;
}
