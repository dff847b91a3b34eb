/**
 * A cluster of real processes on loopback: Redis, cachestores, workers and gateways, each started by the `kivimesh`
 * command as an operator would. Every process is ended by its own id; nothing outlives the test.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { Cachestore, createClient, Inference, type RpcClient, Worker } from "@kivimesh/proto";
import { type RedisServer, startRedis } from "@kivimesh/proto/testing";

const COMMAND = fileURLToPath(new URL("../../cli/bin/kivimesh.mjs", import.meta.url));
const START_TIMEOUT_MS = 120_000;
const KEPT_LOG_CHARACTERS = 64 * 1024;

/** The model of the suite, small enough for a software GPU. */
export const TEST_MODEL = process.env.KIVIMESH_TEST_MODEL ?? "smollm2-135m-instruct";

/** A free TCP port on loopback at the time of asking. */
export async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}

/** Polls `condition` until it holds. @throws after `timeoutMs`, naming what was waited for. */
export async function until(
  what: string,
  condition: () => Promise<boolean> | boolean,
  timeoutMs = 60_000,
): Promise<void> {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    if (await condition()) return;
    if (Date.now() > deadline) throw new Error(`still waiting for ${what} after ${timeoutMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

/** One process of the cluster, with the end of its output. */
export class ClusterProcess {
  readonly child: ChildProcess;
  readonly name: string;
  output = "";
  private readonly exited: Promise<number | null>;

  constructor(name: string, command: string, args: readonly string[], options: { cwd?: string } = {}) {
    this.name = name;
    // Its own process group, as a shell makes one: a terminal's Ctrl-C reaches the whole group.
    this.child = spawn(command, args, { ...options, detached: true, stdio: ["ignore", "pipe", "pipe"] });
    const keep = (chunk: Buffer) => {
      this.output = (this.output + chunk.toString()).slice(-KEPT_LOG_CHARACTERS);
    };
    this.child.stdout?.on("data", keep);
    this.child.stderr?.on("data", keep);
    this.exited = new Promise((resolve) => this.child.once("exit", (code) => resolve(code)));
  }

  get running(): boolean {
    return this.child.exitCode === null && this.child.signalCode === null;
  }

  /** Sends a signal and waits for the end. @returns the exit code; null where a signal ended it. */
  async stop(signal: NodeJS.Signals = "SIGTERM"): Promise<number | null> {
    if (this.running) this.child.kill(signal);
    return this.exited;
  }

  /** What Ctrl-C in a terminal does. @returns the exit code; null where a signal ended it. */
  async interrupt(): Promise<number | null> {
    if (this.running && this.child.pid !== undefined) process.kill(-this.child.pid, "SIGINT");
    return this.exited;
  }

  /** Ends whatever is left of the process group. */
  killGroup(): void {
    try {
      if (this.child.pid !== undefined) process.kill(-this.child.pid, "SIGKILL");
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
    }
  }
}

async function ready(process: ClusterProcess, url: string): Promise<void> {
  await until(
    `${process.name} at ${url}`,
    async () => {
      if (!process.running) throw new Error(`${process.name} ended:\n${process.output}`);
      const response = await fetch(url).catch(() => undefined);
      return response?.ok === true;
    },
    START_TIMEOUT_MS,
  ).catch((error: Error) => {
    throw new Error(`${error.message}\n${process.output}`);
  });
}

export interface WorkerHandle {
  readonly id: string;
  readonly process: ClusterProcess;
  readonly rpc: RpcClient<typeof Worker>;
}

export interface CachestoreHandle {
  readonly process: ClusterProcess;
  readonly address: string;
  readonly dataDirectory: string;
  readonly rpc: RpcClient<typeof Cachestore>;
}

export interface GatewayHandle {
  readonly process: ClusterProcess;
  readonly httpUrl: string;
  readonly grpcAddress: string;
  readonly rpc: RpcClient<typeof Inference>;
}

/** Starts and ends roles. `await using` ends everything. */
export class Cluster implements AsyncDisposable {
  readonly redis: RedisServer;
  readonly directory: string;
  private readonly processes: ClusterProcess[] = [];
  private readonly clients: { close(): void }[] = [];

  private constructor(redis: RedisServer, directory: string) {
    this.redis = redis;
    this.directory = directory;
  }

  static async start(): Promise<Cluster> {
    return new Cluster(await startRedis(), await mkdtemp(join(tmpdir(), "kivimesh-test-")));
  }

  private run(name: string, args: readonly string[]): ClusterProcess {
    const started = new ClusterProcess(name, process.execPath, [COMMAND, ...args]);
    this.processes.push(started);
    return started;
  }

  private client<S extends Parameters<typeof createClient>[0]>(service: S, address: string): RpcClient<S> {
    const client = createClient(service, address);
    this.clients.push(client);
    return client as RpcClient<S>;
  }

  async cachestore(options: { port?: number; dataDirectory?: string } = {}): Promise<CachestoreHandle> {
    const port = options.port ?? (await freePort());
    const metricsPort = await freePort();
    const dataDirectory = options.dataDirectory ?? (await mkdtemp(join(this.directory, "cachestore-")));
    const process = this.run("cachestore", [
      "cachestore",
      ...["--port", String(port), "--data-directory", dataDirectory, "--metrics-port", String(metricsPort)],
    ]);
    await ready(process, `http://127.0.0.1:${metricsPort}/readyz`);
    const address = `127.0.0.1:${port}`;
    return { process, address, dataDirectory, rpc: this.client(Cachestore, address) };
  }

  async worker(
    id: string,
    cachestoreAddress: string | undefined,
    extra: readonly string[] = [],
  ): Promise<WorkerHandle> {
    const port = await freePort();
    const metricsPort = await freePort();
    const process = this.run(`worker ${id}`, [
      "worker",
      ...["--redis", this.redis.url, "--id", id, "--port", String(port), "--metrics-port", String(metricsPort)],
      ...["--model", TEST_MODEL],
      ...(cachestoreAddress === undefined ? [] : ["--cachestore", cachestoreAddress]),
      ...extra,
    ]);
    await ready(process, `http://127.0.0.1:${metricsPort}/readyz`);
    return { id, process, rpc: this.client(Worker, `127.0.0.1:${port}`) };
  }

  /** Starts a gateway and waits until it would serve. */
  async gateway(extra: readonly string[] = []): Promise<GatewayHandle> {
    const [httpPort, grpcPort] = [await freePort(), await freePort()];
    const process = this.run("gateway", [
      "gateway",
      ...["--redis", this.redis.url, "--http-port", String(httpPort), "--grpc-port", String(grpcPort)],
      ...extra,
    ]);
    const httpUrl = `http://127.0.0.1:${httpPort}`;
    await ready(process, `${httpUrl}/readyz`);
    const grpcAddress = `127.0.0.1:${grpcPort}`;
    return { process, httpUrl, grpcAddress, rpc: this.client(Inference, grpcAddress) };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of this.clients) client.close();
    await Promise.all(this.processes.map((process) => process.stop("SIGKILL")));
    await this.redis.stop();
    await rm(this.directory, { recursive: true, force: true });
  }
}
