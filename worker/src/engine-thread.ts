/** The engine's own thread: Dawn's node binding spins while it waits for the GPU, and must not hold up the network. */
import { parentPort, workerData } from "node:worker_threads";
import { ClusterError, toClusterError } from "@kivimesh/proto";
import type { BlockSink, BlockTransfer } from "./block-transfer.ts";
import { Engine } from "./engine.ts";
import {
  type EngineThreadData,
  type FromEngine,
  statsIntervalMs,
  type ToEngine,
  transferList,
} from "./engine-messages.ts";
import { type EngineParts, openEngineParts } from "./open-engine.ts";

if (parentPort === null) throw new RangeError("engine-thread.ts runs in a worker thread only");
const port = parentPort;

function send(message: FromEngine, ...payloads: (Uint8Array | Float32Array | undefined)[]): void {
  port.postMessage(message, transferList(...payloads));
}

function plain(error: unknown) {
  if (error instanceof ClusterError) return { code: error.code, message: error.message };
  // Nobody outside sees this text but the worker's own log.
  return { code: toClusterError(error).code, message: error instanceof Error ? error.message : String(error) };
}

/** Fetches and publishes by way of the main thread. */
class PortTransfer implements BlockTransfer {
  readonly #sinks = new Map<number, BlockSink>();

  fetch: BlockTransfer["fetch"] = (fetch, sink) => {
    this.#sinks.set(fetch.fetchId, sink);
    send({ type: "fetch", fetch });
  };

  sealed: BlockTransfer["sealed"] = (blocks) => send({ type: "sealed", blocks });

  take(message: Extract<ToEngine, { type: "block" | "fetchEnded" }>): void {
    const sink = this.#sinks.get(message.fetchId);
    if (message.type === "block") {
      sink?.block(message.fetchId, message.id, message.payload);
      return;
    }
    this.#sinks.delete(message.fetchId);
    sink?.ended(message.fetchId, message.report);
  }
}

function startEngine({ model, options }: EngineParts, transfer: BlockTransfer): Engine {
  let reported = 0;
  let timer: NodeJS.Timeout | undefined;
  const report = () => {
    timer = undefined;
    reported = performance.now();
    send({ type: "stats", stats: engine.stats(engine.idle) });
  };
  const engine = new Engine({
    ...options,
    transfer,
    onEvents: (events) => {
      const logits = events.map((event) => (event.type === "tokens" ? event.firstLogits : undefined));
      send({ type: "events", events }, ...logits);
    },
    onPrefixChange: (change) => send({ type: "prefix", change }),
    onStats: () => {
      if (timer !== undefined) return;
      timer = setTimeout(report, Math.max(0, reported + statsIntervalMs - performance.now()));
    },
    onFailure: (error) => send({ type: "failed", error: plain(error) }),
  });
  const { runner } = options;
  send({
    type: "ready",
    model: {
      name: model.name,
      digest: model.digest,
      tokenizer: model.tokenizer,
      kv: runner.kv,
      limits: runner.limits,
      device: runner.device,
    },
    stats: engine.stats(),
  });
  void runner.lost.then((reason) => send({ type: "failed", error: { code: "DEVICE_LOST", message: reason } }));
  return engine;
}

async function read(engine: Engine, readId: number, id: string): Promise<void> {
  try {
    const payload = await engine.readBlock(id);
    send({ type: "read", readId, ...(payload === undefined ? {} : { payload }) }, payload);
  } catch (error) {
    send({ type: "read", readId, error: plain(error) });
  }
}

async function main({ config }: EngineThreadData): Promise<void> {
  const parts = await openEngineParts(config, (done, total) => send({ type: "progress", done, total }));
  const transfer = new PortTransfer();
  const engine = startEngine(parts, transfer);
  let closing = false;
  const handlers: { [T in ToEngine["type"]]: (message: Extract<ToEngine, { type: T }>) => void } = {
    submit: ({ request }) => engine.submit(request),
    abort: ({ requestId, epoch }) => engine.abort(requestId, epoch),
    drain: () => engine.drain(),
    read: ({ readId, id }) => void read(engine, readId, id),
    stats: ({ statsId }) => send({ type: "stats", statsId, stats: engine.stats() }),
    block: (message) => transfer.take(message),
    fetchEnded: (message) => transfer.take(message),
    close: () => {
      if (closing) return;
      closing = true;
      void close();
    },
  };
  async function close(): Promise<void> {
    try {
      await engine.close();
      await parts.gpu.close();
      parts.model.close();
    } catch (error) {
      send({ type: "failed", error: plain(error) });
    }
    send({ type: "closed" });
  }
  port.on("message", (message: ToEngine) => {
    (handlers[message.type] as (message: ToEngine) => void)(message);
  });
}

main(workerData as EngineThreadData).catch((error: unknown) => {
  send({ type: "failed", error: plain(error) });
  send({ type: "closed" });
});
