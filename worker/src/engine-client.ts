/** The main thread's handle on an engine thread. */
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { Worker } from "node:worker_threads";
import { ClusterError } from "@kivimesh/proto";
import type { BlockTransfer } from "./block-transfer.ts";
import { type EngineConfig, prepareDriverEnvironment } from "./config.ts";
import {
  type EngineThreadData,
  type FromEngine,
  type ModelDescription,
  type PlainError,
  type ToEngine,
  transferList,
} from "./engine-messages.ts";
import type { EngineStats } from "./engine-stats.ts";
import type { GenerationEvent, GenerationRequest } from "./generation.ts";
import type { PrefixIndexChange } from "./page-pool.ts";

/** How long a busy engine thread may take to answer before its last report stands in, in milliseconds. */
const statsTimeoutMs = 1_000;

/** How long a closing engine may finish its step before its thread is left behind, in milliseconds. */
const closeTimeoutMs = 30_000;

/** The same for an engine that failed: it has no step to finish, and its driver may never answer. */
const failedCloseTimeoutMs = 1_000;

/** What an engine thread tells; set before anything is submitted. */
export interface EngineListeners {
  onEvents(events: readonly GenerationEvent[]): void;
  onPrefixChange(change: PrefixIndexChange): void;
  onStats(stats: EngineStats): void;
}

interface Waiter<T> {
  resolve(value: T): void;
  reject(error: Error): void;
}

const silent: EngineListeners = { onEvents() {}, onPrefixChange() {}, onStats() {} };

/** An engine in a thread of its own. After a failure nothing runs any more, and `submit` has no effect. */
export class EngineClient {
  readonly model: ModelDescription;
  /** Resolves with the reason if the GPU, the engine or its thread fails. */
  readonly failed: Promise<ClusterError>;
  readonly #thread: Worker;
  readonly #reads = new Map<number, Waiter<Uint8Array | undefined>>();
  readonly #stats = new Map<number, (stats: EngineStats) => void>();
  readonly #exited: Promise<void>;
  #listeners: EngineListeners = silent;
  #transfer: BlockTransfer | undefined;
  #lastStats: EngineStats;
  #nextId = 1;
  #closing = false;
  #failure: ClusterError | undefined;
  #reportFailure: (error: ClusterError) => void = () => undefined;

  /**
   * Starts the thread and loads the model.
   * @throws ClusterError of `loadModel` and `openModelRunner`; INTERNAL where the package was not built.
   */
  static async start(config: EngineConfig, onProgress?: (done: number, total: number) => void): Promise<EngineClient> {
    prepareDriverEnvironment(process.env);
    const data: EngineThreadData = { config: plainConfig(config) };
    // Not the parent's node options: loaders of TypeScript or test runners have no place in the thread.
    const thread = new Worker(threadFile(), { workerData: data, execArgv: [] });
    try {
      return await new Promise<EngineClient>((resolve, reject) => {
        const onExit = (code: number) => reject(threadEnded(code));
        const onMessage = (message: FromEngine) => {
          if (message.type === "progress") onProgress?.(message.done, message.total);
          if (message.type === "failed") reject(new ClusterError(message.error.code, message.error.message));
          if (message.type !== "ready") return;
          thread.off("error", reject).off("exit", onExit).off("message", onMessage);
          // Here and not behind an await: a failure that follows at once must find its listener.
          resolve(new EngineClient(thread, message.model, message.stats));
        };
        thread.once("error", reject).once("exit", onExit).on("message", onMessage);
      });
    } catch (error) {
      await thread.terminate();
      throw error;
    }
  }

  private constructor(thread: Worker, model: ModelDescription, stats: EngineStats) {
    this.model = model;
    this.#thread = thread;
    this.#lastStats = stats;
    this.failed = new Promise((resolve) => {
      this.#reportFailure = resolve;
    });
    this.#exited = new Promise((resolve) => {
      thread.once("exit", (code) => {
        this.#fail(threadEnded(code));
        resolve();
      });
    });
    thread.on("error", (error) => this.#fail({ code: "INTERNAL", message: String(error) }));
    thread.on("message", (message: FromEngine) => this.#receive(message));
  }

  /** Why nothing runs any more, if so. */
  get failure(): ClusterError | undefined {
    return this.#failure;
  }

  /** The newest report, at most some steps old. */
  get lastStats(): EngineStats {
    return this.#lastStats;
  }

  listen(listeners: EngineListeners): void {
    this.#listeners = listeners;
  }

  /** Without one, nothing is fetched from or published to other stores. */
  attachTransfer(transfer: BlockTransfer): void {
    this.#transfer = transfer;
  }

  submit(request: GenerationRequest): void {
    this.#send({ type: "submit", request });
  }

  abort(requestId: string, epoch: number): void {
    this.#send({ type: "abort", requestId, epoch });
  }

  /** See Engine.drain. */
  drain(): void {
    this.#send({ type: "drain" });
  }

  /** The payload of a block in the GPU pool, or undefined, also after a failure. @throws ClusterError DEVICE_LOST. */
  readBlock(id: string): Promise<Uint8Array | undefined> {
    if (this.#ended) return Promise.resolve(undefined);
    const readId = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#reads.set(readId, { resolve, reject });
      this.#send({ type: "read", readId, id });
    });
  }

  /** Of now, or the last report where the thread is busy with a long step. */
  stats(): Promise<EngineStats> {
    if (this.#ended) return Promise.resolve(this.#lastStats);
    const statsId = this.#nextId++;
    return new Promise((resolve) => {
      const timer = setTimeout(() => {
        this.#stats.delete(statsId);
        resolve(this.#lastStats);
      }, statsTimeoutMs);
      this.#stats.set(statsId, (stats) => {
        clearTimeout(timer);
        resolve(stats);
      });
      this.#send({ type: "stats", statsId });
    });
  }

  /**
   * Aborts what runs, closes the GPU and ends the thread. A thread that does not come to its end in time is left to
   * itself, without keeping the process: ended from here amid GPU work, it would take the whole process with it.
   */
  async close(): Promise<void> {
    this.#closing = true;
    this.#send({ type: "close" });
    const timeoutMs = this.#failure === undefined ? closeTimeoutMs : failedCloseTimeoutMs;
    let timer: NodeJS.Timeout | undefined;
    const timeout = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, timeoutMs);
    });
    await Promise.race([this.#exited, timeout]);
    clearTimeout(timer);
    this.#thread.unref();
  }

  get #ended(): boolean {
    return this.#closing || this.#failure !== undefined;
  }

  #send(message: ToEngine, payload?: Uint8Array): void {
    this.#thread.postMessage(message, transferList(payload));
  }

  #receive(message: FromEngine): void {
    const handlers: { [T in FromEngine["type"]]?: (message: Extract<FromEngine, { type: T }>) => void } = {
      events: ({ events }) => this.#listeners.onEvents(events),
      prefix: ({ change }) => this.#listeners.onPrefixChange(change),
      stats: ({ stats, statsId }) => this.#takeStats(stats, statsId),
      read: (read) => this.#takeRead(read),
      fetch: ({ fetch }) => this.#fetch(fetch),
      sealed: ({ blocks }) => this.#transfer?.sealed(blocks),
      failed: ({ error }) => this.#fail(error),
      closed: () => void this.#thread.terminate(),
    };
    (handlers[message.type] as ((message: FromEngine) => void) | undefined)?.(message);
  }

  #fetch(fetch: Extract<FromEngine, { type: "fetch" }>["fetch"]): void {
    const ended = { bytes: 0, seconds: 0 };
    if (this.#transfer === undefined) {
      this.#send({ type: "fetchEnded", fetchId: fetch.fetchId, report: ended });
      return;
    }
    this.#transfer.fetch(fetch, {
      block: (fetchId, id, payload) => this.#send({ type: "block", fetchId, id, payload }, payload),
      ended: (fetchId, report) => this.#send({ type: "fetchEnded", fetchId, report }),
    });
  }

  #takeStats(stats: EngineStats, statsId: number | undefined): void {
    this.#lastStats = stats;
    this.#listeners.onStats(stats);
    if (statsId === undefined) return;
    this.#stats.get(statsId)?.(stats);
    this.#stats.delete(statsId);
  }

  #takeRead({ readId, payload, error }: Extract<FromEngine, { type: "read" }>): void {
    const waiter = this.#reads.get(readId);
    this.#reads.delete(readId);
    if (error === undefined) waiter?.resolve(payload);
    else waiter?.reject(new ClusterError(error.code, error.message));
  }

  #fail({ code, message }: PlainError): void {
    for (const waiter of this.#reads.values()) waiter.resolve(undefined);
    this.#reads.clear();
    if (this.#closing || this.#failure !== undefined) return;
    this.#failure = new ClusterError(code, message);
    this.#reportFailure(this.#failure);
  }
}

/** The device is gone with its thread. */
function threadEnded(code: number): ClusterError {
  return new ClusterError("DEVICE_LOST", `the engine thread ended with code ${code}`);
}

/** The thread's file in dist: Node cannot run TypeScript in a thread. */
function threadFile(): string {
  const built = import.meta.url.endsWith(".js") ? "./engine-thread.js" : "../dist/engine-thread.js";
  const file = fileURLToPath(new URL(built, import.meta.url));
  if (!existsSync(file)) {
    throw new ClusterError("INTERNAL", `${file} is missing: build it with "npx tsc -b worker"`);
  }
  return file;
}

/** Only what the thread needs: functions cannot be sent to it. */
function plainConfig(config: EngineConfig): EngineConfig {
  const { modelPath, dummyArchitecture, dummySeed, modelName, kvFormat, blockTokens, residualTokens } = config;
  const { maxSequences, kvBytes, maxPrefillRows, maxContextTokens, numerics, gpuAdapter } = config;
  return {
    ...{ modelPath, dummyArchitecture, dummySeed, modelName, kvFormat, blockTokens, residualTokens },
    ...{ maxSequences, kvBytes, maxPrefillRows, maxContextTokens, numerics, gpuAdapter },
  };
}
