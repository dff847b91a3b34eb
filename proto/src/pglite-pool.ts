import { EventEmitter } from "node:events";
import { PGlite, types } from "@electric-sql/pglite";
import type { PgPool, PgPoolClient, PgQueryResult } from "bullmq";

/** An in-process Postgres in the shape of a node-postgres pool, as far as BullMQ's Postgres backend uses one. */
export interface PglitePool extends PgPool {
  /** Ends the database; every client of the pool ends with it. */
  end(): Promise<void>;
  /** All of it as a gzipped tar archive. */
  dump(): Promise<Blob>;
}

export interface PglitePoolOptions {
  /** Where the database lives; left out: in memory. */
  dataDirectory?: string;
  /** A dump of an earlier database (a tar archive), to start from instead of an empty one. Only in memory. */
  dump?: Blob;
}

/**
 * Opens PGlite and wraps it as a pool. There is one session, so all clients share it: queries run one after the other,
 * and every listening client hears the session's notifications.
 */
export async function openPglitePool(options: PglitePoolOptions = {}): Promise<PglitePool> {
  const database = await PGlite.create({
    // As node-postgres does: 64-bit integers stay text.
    parsers: { [types.INT8]: (text: string) => text },
    ...(options.dataDirectory !== undefined && { dataDir: options.dataDirectory }),
    ...(options.dump !== undefined && { loadDataDir: options.dump }),
  });
  return new SharedSessionPool(database);
}

class SharedSessionPool extends EventEmitter implements PglitePool {
  readonly #database: PGlite;
  readonly #clients = new Set<SharedSessionClient>();

  constructor(database: PGlite) {
    super();
    // Every queue and every consumer listens for pool errors.
    this.setMaxListeners(0);
    this.#database = database;
    database.onNotification((channel, payload) => {
      for (const client of this.#clients) {
        client.emit("notification", { channel, payload });
      }
    });
  }

  query<R>(text: string, parameters: readonly unknown[] = []): Promise<PgQueryResult<R>> {
    return runQuery<R>(this.#database, text, parameters);
  }

  async connect(): Promise<PgPoolClient> {
    const client = new SharedSessionClient(this.#database, () => this.#clients.delete(client));
    this.#clients.add(client);
    return client;
  }

  dump(): Promise<Blob> {
    return this.#database.dumpDataDir("gzip");
  }

  async end(): Promise<void> {
    this.#clients.clear();
    await this.#database.close();
  }
}

class SharedSessionClient extends EventEmitter implements PgPoolClient {
  readonly #database: PGlite;
  readonly #onRelease: () => void;

  constructor(database: PGlite, onRelease: () => void) {
    super();
    this.setMaxListeners(0);
    this.#database = database;
    this.#onRelease = onRelease;
  }

  query<R>(text: string, parameters: readonly unknown[] = []): Promise<PgQueryResult<R>> {
    return runQuery<R>(this.#database, text, parameters);
  }

  release(): void {
    this.removeAllListeners();
    this.#onRelease();
  }
}

/** Only the simple protocol (`exec`) runs several statements at once, as migrations do; only the other takes parameters. */
async function runQuery<R>(database: PGlite, text: string, parameters: readonly unknown[]): Promise<PgQueryResult<R>> {
  if (parameters.length > 0) {
    const { rows, affectedRows } = await database.query<R>(text, [...parameters]);
    return { rows, rowCount: affectedRows ?? rows.length };
  }
  const last = (await database.exec(text)).at(-1);
  const rows = (last?.rows ?? []) as R[];
  return { rows, rowCount: last?.affectedRows ?? rows.length };
}
