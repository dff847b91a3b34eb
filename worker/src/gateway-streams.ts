import type { MessageInitShape } from "@bufbuild/protobuf";
import { ClusterError, type SubscribeResponseSchema } from "@kivimesh/proto";
import { idBytes } from "./block-chain.ts";
import type { EngineStats } from "./engine-stats.ts";
import { EventChannel } from "./event-channel.ts";
import type { PrefixIndexChange } from "./page-pool.ts";

/** Events that a slow gateway may leave unread; beyond that its stream is cut, and its requests end. */
const maxBufferedEvents = 16_384;
/** How long a gateway may be gone before its requests are aborted, in milliseconds. */
export const gatewayGraceMs = 2_000;
/** Least time between two load reports on a stream, in milliseconds. */
const loadIntervalMs = 250;
/** Ids in one prefix event. */
const maxIdsPerEvent = 1_024;

/** One event of a subscription. */
export type StreamEvent = MessageInitShape<typeof SubscribeResponseSchema>;

interface GatewayStream {
  readonly channel: EventChannel<StreamEvent>;
  lastLoad: string;
}

/** The subscriptions of gateways: one stream for each gateway id, the newest. */
export class GatewayStreams {
  readonly #streams = new Map<string, GatewayStream>();
  readonly #graces = new Map<string, NodeJS.Timeout>();
  readonly #waiters = new Map<string, Set<() => void>>();
  readonly #onGone: (gatewayId: string) => void;
  readonly #held = new Set<string>();
  #load: EngineStats | undefined;
  #loadTimer: NodeJS.Timeout | undefined;
  #closed = false;

  /** @param onGone told when a gateway did not come back within its grace. */
  constructor(onGone: (gatewayId: string) => void) {
    this.#onGone = onGone;
  }

  get size(): number {
    return this.#streams.size;
  }

  /** Whether the gateway listens now or may still come back. */
  knows(gatewayId: string): boolean {
    return this.#streams.has(gatewayId) || this.#graces.has(gatewayId);
  }

  /** Events for a gateway until `signal` aborts, a newer subscription replaces this one, or the streams are closed. */
  async *subscribe(gatewayId: string, signal: AbortSignal): AsyncGenerator<StreamEvent, void, undefined> {
    if (this.#closed) throw new ClusterError("WORKER_DRAINING", "the worker is shutting down");
    const stream: GatewayStream = { channel: new EventChannel(), lastLoad: "" };
    this.#streams.get(gatewayId)?.channel.end();
    this.#streams.set(gatewayId, stream);
    clearTimeout(this.#graces.get(gatewayId));
    this.#graces.delete(gatewayId);
    for (const waiter of this.#waiters.get(gatewayId) ?? []) waiter();
    const end = () => stream.channel.end();
    signal.addEventListener("abort", end, { once: true });
    try {
      this.#pushLoad(stream);
      for (const event of prefixEvents({ added: [...this.#held], removed: [] }, true)) stream.channel.push(event);
      yield* stream.channel;
    } finally {
      signal.removeEventListener("abort", end);
      stream.channel.end();
      if (this.#streams.get(gatewayId) === stream) this.#leave(gatewayId);
    }
  }

  /** Sends an event to one gateway; dropped if it does not listen. */
  send(gatewayId: string, event: StreamEvent): void {
    const stream = this.#streams.get(gatewayId);
    if (stream === undefined) return;
    stream.channel.push(event);
    if (stream.channel.length <= maxBufferedEvents) return;
    stream.channel.fail(new ClusterError("UNAVAILABLE", `${maxBufferedEvents} events were not read in time`));
    this.#leave(gatewayId);
  }

  /** Whether the gateway listens, waiting up to its grace for it to do so. */
  async listens(gatewayId: string): Promise<boolean> {
    if (this.#streams.has(gatewayId)) return true;
    const waiters = this.#waiters.get(gatewayId) ?? new Set();
    this.#waiters.set(gatewayId, waiters);
    return new Promise((resolve) => {
      const settle = (listens: boolean) => {
        clearTimeout(timer);
        waiters.delete(waiter);
        if (waiters.size === 0) this.#waiters.delete(gatewayId);
        resolve(listens);
      };
      const waiter = () => settle(true);
      const timer = setTimeout(() => settle(false), gatewayGraceMs);
      waiters.add(waiter);
    });
  }

  /** Tells every gateway, not more often than each `loadIntervalMs`. */
  load(stats: EngineStats): void {
    this.#load = stats;
    this.#loadTimer ??= setTimeout(() => {
      this.#loadTimer = undefined;
      for (const stream of this.#streams.values()) this.#pushLoad(stream);
    }, loadIntervalMs);
  }

  /** Tells every gateway which blocks the GPU pool holds, or no longer. */
  prefix(change: PrefixIndexChange): void {
    for (const id of change.removed) this.#held.delete(id);
    for (const id of change.added) this.#held.add(id);
    for (const event of prefixEvents(change, false)) {
      for (const gatewayId of [...this.#streams.keys()]) this.send(gatewayId, event);
    }
  }

  /** Ends every stream behind what was sent. */
  close(): void {
    this.#closed = true;
    clearTimeout(this.#loadTimer);
    for (const timer of this.#graces.values()) clearTimeout(timer);
    this.#graces.clear();
    for (const { channel } of this.#streams.values()) channel.end();
  }

  #leave(gatewayId: string): void {
    this.#streams.delete(gatewayId);
    if (this.#closed) return;
    clearTimeout(this.#graces.get(gatewayId));
    const timer = setTimeout(() => {
      this.#graces.delete(gatewayId);
      this.#onGone(gatewayId);
    }, gatewayGraceMs);
    this.#graces.set(gatewayId, timer);
  }

  #pushLoad(stream: GatewayStream): void {
    if (this.#load === undefined) return;
    const value = loadOf(this.#load);
    const text = JSON.stringify(value);
    if (text === stream.lastLoad) return;
    stream.lastLoad = text;
    stream.channel.push({ event: { case: "load", value } });
  }
}

/** The Load message of an engine's report. */
export function loadOf(stats: EngineStats) {
  return {
    running: stats.running,
    waiting: stats.waiting,
    waitingPromptTokens: stats.waitingPromptTokens,
    freePages: stats.freePages,
    totalPages: stats.totalPages,
    prefillTokensPerSecond: stats.prefillTokensPerSecond,
  };
}

function* prefixEvents(change: PrefixIndexChange, cleared: boolean): Generator<StreamEvent> {
  const count = Math.max(change.added.length, change.removed.length);
  for (let start = 0; start < count || (cleared && start === 0); start += maxIdsPerEvent) {
    const part = (ids: readonly string[]) => ids.slice(start, start + maxIdsPerEvent).map(idBytes);
    const value = { added: part(change.added), removed: part(change.removed), cleared: cleared && start === 0 };
    yield { event: { case: "prefix", value } };
  }
}
