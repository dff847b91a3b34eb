import { type ChildProcess, spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Redis } from "ioredis";

/** A real redis-server for tests. */
export interface RedisServer {
  readonly url: string;
  readonly port: number;
  /** Ends the process at once, as a crash would; what it kept on disk stays for `restart`. */
  kill(): Promise<void>;
  /** Starts it again on the same port with the same data. */
  restart(): Promise<void>;
  /** Ends the process and removes its data. */
  stop(): Promise<void>;
}

const startDeadlineMs = 20_000;

/** Starts redis-server (from the PATH) on a free port of 127.0.0.1, with an append-only file in a temporary folder. */
export async function startRedis(): Promise<RedisServer> {
  const directory = await mkdtemp(join(tmpdir(), "kivimesh-redis-"));
  const port = await freePort();
  let child = await launch(port, directory);
  const url = `redis://127.0.0.1:${port}`;
  return {
    url,
    port,
    kill: () => end(child),
    async restart() {
      await end(child);
      child = await launch(port, directory);
    },
    async stop() {
      await end(child);
      await rm(directory, { recursive: true, force: true });
    },
  };
}

async function launch(port: number, directory: string): Promise<ChildProcess> {
  const settings = ["--port", port, "--bind", "127.0.0.1", "--dir", directory, "--appendonly", "yes", "--save", ""];
  const child = spawn("redis-server", settings.map(String), { stdio: "ignore" });
  const failed = new Promise<never>((_, reject) => {
    child.once("error", reject);
    child.once("exit", (code) => reject(new Error(`redis-server ended with ${code}`)));
  });
  failed.catch(() => {
    // Only the race below cares; a later exit is a test's own doing.
  });
  await Promise.race([failed, answers(port)]);
  return child;
}

async function answers(port: number): Promise<void> {
  const redis = new Redis(port, "127.0.0.1", {
    maxRetriesPerRequest: null,
    retryStrategy: () => 20,
    connectTimeout: startDeadlineMs,
  });
  redis.on("error", () => {
    // Refused until the server listens; the retry strategy goes on.
  });
  try {
    await redis.ping();
  } finally {
    redis.disconnect();
  }
}

async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) {
    return;
  }
  const ended = new Promise((resolve) => child.once("exit", resolve));
  child.kill("SIGKILL");
  await ended;
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  if (address === null || typeof address === "string") {
    throw new Error("no free port");
  }
  return address.port;
}
