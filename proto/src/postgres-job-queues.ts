import { createPostgresBackend, DEFAULT_SCHEMA, type PgPool, Queue, runMigrations, Worker } from "bullmq";
import { type JobQueues, jobQueuesOver, queueOptions, workerOptions } from "./job-queue.ts";
import { createLogger, type Logger } from "./logging.ts";
import { openPglitePool } from "./pglite-pool.ts";

/** Job queues in Postgres (BullMQ's own backend). Brings the schema up to date; `pool` stays its owner's. */
export async function postgresJobQueues(options: { pool: PgPool; logger?: Logger }): Promise<JobQueues> {
  await prepareSchema(options.pool);
  return queuesOver(options.pool, options.logger, async () => {});
}

/** Job queues in this process, in an embedded Postgres: in memory, or kept in `dataDirectory`. Nothing else to install. */
export async function pgliteJobQueues(options: { dataDirectory?: string; logger?: Logger } = {}): Promise<JobQueues> {
  const pool = await openPglitePool(options.dataDirectory);
  await prepareSchema(pool);
  return queuesOver(pool, options.logger, () => pool.end());
}

/** Migrates in one transaction under an advisory lock; a schema that is current costs a few reads. */
async function prepareSchema(pool: PgPool): Promise<void> {
  const client = await pool.connect();
  try {
    await runMigrations(client);
    // BullMQ's queries name no schema. One session serves all of an embedded pool; a real pool sets it for each connection.
    await client.query(`SET search_path TO ${DEFAULT_SCHEMA}`);
  } finally {
    client.release();
  }
}

function queuesOver(pool: PgPool, logger: Logger | undefined, close: () => Promise<void>): JobQueues {
  return jobQueuesOver(
    {
      queue: (name) => new Queue(name, { ...queueOptions, connection: pool }, createPostgresBackend),
      worker: (name, processor, concurrency) =>
        new Worker(name, processor, { ...workerOptions, concurrency, connection: pool }, createPostgresBackend),
      ping: () => pool.query("SELECT 1"),
      close,
    },
    logger ?? createLogger("queue", "warn"),
  );
}
