import { createPostgresBackend, DEFAULT_SCHEMA, type PgPool, Queue, runMigrations, Worker } from "bullmq";
import { ClusterError } from "./errors.ts";
import { type JobQueues, jobQueuesOver, queueOptions, workerOptions } from "./job-queue.ts";
import { createLogger, type Logger } from "./logging.ts";
import { openPglitePool, type PglitePool } from "./pglite-pool.ts";
import { openFromTemplate } from "./pglite-template.ts";

/** BullMQ's queries name no schema. */
const searchPathSql = `SET search_path TO ${DEFAULT_SCHEMA}`;

/**
 * Job queues in Postgres (BullMQ's own backend). Brings the schema up to date; `pool` stays its owner's, but every
 * connection that it opens from now on looks into BullMQ's schema only.
 *
 * @throws ClusterError INVALID_ARGUMENT for a pool that has connections already: those would look elsewhere.
 */
export async function postgresJobQueues(options: { pool: PgPool; logger?: Logger }): Promise<JobQueues> {
  const { pool } = options;
  if ((pool as { totalCount?: number }).totalCount) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      "the pool has connections already: give the queues a pool of their own",
      {
        parameter: "pool",
      },
    );
  }
  // A connection runs its queries in order: this one comes before any that asked for it.
  pool.on("connect", (client) => {
    client.query(searchPathSql).catch((error: Error) => options.logger?.error({ err: error }, "search path"));
  });
  await prepareSchema(pool);
  return queuesOver(options.pool, options.logger ?? createLogger("queue", "warn"), async () => {});
}

export interface PgliteQueueOptions {
  /** Where jobs are kept; left out: in memory, and gone with the process. */
  dataDirectory?: string;
  /**
   * Where an in-memory queue keeps an empty, prepared database: the first start writes it, later ones take a third of the
   * time. Safe to delete.
   */
  cacheDirectory?: string;
  logger?: Logger;
}

/** Job queues in this process, in an embedded Postgres: nothing else to install. */
export async function pgliteJobQueues(options: PgliteQueueOptions = {}): Promise<JobQueues> {
  const logger = options.logger ?? createLogger("queue", "warn");
  const pool = await openPrepared(options, logger);
  return queuesOver(pool, logger, () => pool.end());
}

async function openPrepared(options: PgliteQueueOptions, logger: Logger): Promise<PglitePool> {
  const { dataDirectory, cacheDirectory } = options;
  if (dataDirectory === undefined && cacheDirectory !== undefined) {
    return openFromTemplate(cacheDirectory, prepareSchema, logger);
  }
  const pool = await openPglitePool(dataDirectory === undefined ? {} : { dataDirectory });
  await prepareSchema(pool);
  return pool;
}

/** Migrates in one transaction under an advisory lock; a schema that is current costs a few reads. */
async function prepareSchema(pool: PgPool): Promise<void> {
  const client = await pool.connect();
  try {
    await runMigrations(client);
    // One session serves all of an embedded pool, and tells nobody that it connects.
    await client.query(searchPathSql);
  } finally {
    client.release();
  }
}

const queueNamesSql = ["job", "meta", "event"]
  .map((table) => `SELECT queue FROM ${DEFAULT_SCHEMA}.${table} WHERE starts_with(queue, $1)`)
  .join(" UNION ");

function queuesOver(pool: PgPool, logger: Logger, close: () => Promise<void>): JobQueues {
  return jobQueuesOver(
    {
      queue: (name) => new Queue(name, { ...queueOptions, connection: pool }, createPostgresBackend),
      worker: (name, processor, concurrency) =>
        new Worker(name, processor, { ...workerOptions, concurrency, connection: pool }, createPostgresBackend),
      names: async (prefix) => {
        const { rows } = await pool.query<{ queue: string }>(queueNamesSql, [prefix]);
        return rows.map((row) => row.queue);
      },
      ping: () => pool.query("SELECT 1"),
      close,
    },
    logger,
  );
}
