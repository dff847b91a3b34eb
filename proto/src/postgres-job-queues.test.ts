import { EventEmitter } from "node:events";
import { create } from "@bufbuild/protobuf";
import type { PgPool, PgPoolClient, PgQueryResult } from "bullmq";
import { afterAll, beforeAll, expect, it } from "vitest";
import { GenerateJobSchema } from "./gen/kivimesh/v1/worker_pb.ts";
import { createLogger } from "./logging.ts";
import { openPglitePool, type PglitePool } from "./pglite-pool.ts";
import { postgresJobQueues } from "./postgres-job-queues.ts";

const logger = createLogger("test", "silent");
let database: PglitePool;

beforeAll(async () => {
  database = await openPglitePool();
});

afterAll(() => database.end());

/** A pool whose connections have a search path each, as those of a server do; every `connect` opens one. */
class ManySessions extends EventEmitter {
  totalCount = 0;
  #last: Promise<unknown> = Promise.resolve();

  async connect(): Promise<PgPoolClient> {
    const session = await database.connect();
    const plain = session.query.bind(session);
    let path = "public";
    session.query = <R>(text: string, parameters?: readonly unknown[]): Promise<PgQueryResult<R>> => {
      const run = async () => {
        path = /^SET search_path TO (\w+)$/.exec(text)?.[1] ?? path;
        await plain(`SET search_path TO ${path}`);
        return plain<R>(text, parameters);
      };
      const result = this.#last.then(run);
      this.#last = result.catch(() => undefined);
      return result;
    };
    this.totalCount++;
    this.emit("connect", session);
    return session;
  }

  async query<R>(text: string, parameters?: readonly unknown[]): Promise<PgQueryResult<R>> {
    const session = await this.connect();
    try {
      return await session.query<R>(text, parameters);
    } finally {
      session.release();
    }
  }

  async end(): Promise<void> {}
}

it("find BullMQ's schema on every connection of a pool", async () => {
  const sessions = new ManySessions();
  sessions.setMaxListeners(0);
  const queues = await postgresJobQueues({ pool: sessions as unknown as PgPool, logger });
  const received: string[] = [];
  const consumer = await queues.consume("w", async (job) => void received.push(job.requestId), { concurrency: 2 });
  await queues.enqueue("w", create(GenerateJobSchema, { requestId: "r", epoch: 1 }));
  await expect.poll(() => received, { timeout: 10_000 }).toEqual(["r"]);
  expect(sessions.totalCount).toBeGreaterThan(2);
  await consumer.close();
  await queues.close();
  await expect(postgresJobQueues({ pool: sessions as unknown as PgPool, logger })).rejects.toMatchObject({
    code: "INVALID_ARGUMENT",
  });
});
