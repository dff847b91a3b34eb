import { setTimeout as delay } from "node:timers/promises";
import {
  createClient,
  type Finished,
  type GetModelResponse,
  hex,
  type Load,
  type Member,
  type PrefixChange,
  type RpcClient,
  type SubscribeResponse,
  type TlsFiles,
  type Tokens,
  toClusterError,
  Worker,
} from "@kivimesh/proto";
import type { Logger } from "pino";
import type { GatewayLimits } from "./config.ts";
import type { ServedModel } from "./served-model.ts";

const firstReconnectMs = 100;
const lastReconnectMs = 2_000;
const callDeadlineMs = 10_000;
/** Blocks of one worker's pool that the gateway remembers; more would only be missing from routing estimates. */
const maxHeldBlocks = 1_000_000;

/** What links tell the gateway. */
export interface WorkerEvents {
  /** Makes the model known; throws where this gateway cannot serve it. */
  described(model: GetModelResponse): ServedModel;
  /** The worker streams events: it can be given jobs. */
  joined(workerId: string): void;
  tokens(workerId: string, tokens: Tokens): void;
  finished(workerId: string, finished: Finished): void;
  /** Its stream broke: what it sent in the meantime is lost, so its attempts are too. */
  lost(workerId: string, reason: string): void;
}

export interface WorkerLinkOptions {
  readonly gatewayId: string;
  readonly tls: TlsFiles | undefined;
  readonly limits: GatewayLimits;
  readonly log: Logger;
  readonly events: WorkerEvents;
}

/** What a subscribed worker is. */
export interface LinkedModel {
  readonly model: ServedModel;
  readonly kvFormat: string;
  readonly kvFormatId: number;
  readonly blockTokens: number;
  readonly residualTokens: number;
  readonly blockBytes: number;
  readonly device: string;
}

/** The gateway's end of one worker: describes it, follows its events, reconnects for as long as it is wanted. */
export class WorkerLink {
  readonly id: string;
  readonly address: string;
  /** In the membership now. A worker that left it but still streams is draining. */
  announced = true;
  /** Undefined while not subscribed. */
  linked: LinkedModel | undefined;
  load: Load | undefined;
  /** Hex ids of the blocks in its pool. */
  readonly held = new Set<string>();
  private readonly options: WorkerLinkOptions;
  private readonly client: RpcClient<typeof Worker>;
  private readonly closing = new AbortController();
  private lastProblem = "";
  private attempt: AbortController | undefined;

  constructor(member: Member, options: WorkerLinkOptions) {
    this.id = member.id;
    this.address = member.address;
    this.options = options;
    const { keepaliveMs: timeMs, keepaliveTimeoutMs: timeoutMs } = options.limits;
    this.client = createClient(Worker, member.address, {
      keepalive: { timeMs, timeoutMs },
      ...(options.tls === undefined ? {} : { tls: options.tls }),
    });
    void this.follow();
  }

  /** Stops an attempt there. Returns whether the worker heard it: what it sends otherwise is fenced off by the epoch. */
  async abort(requestId: string, epoch: number): Promise<boolean> {
    try {
      await this.client.abort({ requestId, epoch }, { deadline: callDeadlineMs });
      return true;
    } catch (error) {
      this.options.log.debug(
        { worker: this.id, requestId, error: toClusterError(error).message },
        "abort not delivered",
      );
      return false;
    }
  }

  close(): void {
    this.closing.abort();
    this.disconnect("the gateway left");
    this.client.close();
  }

  private async follow(): Promise<void> {
    const { log } = this.options;
    let waitMs = firstReconnectMs;
    while (!this.closing.signal.aborted) {
      this.attempt = new AbortController();
      try {
        const described = await this.client.getModel({}, { deadline: callDeadlineMs, signal: this.attempt.signal });
        const linked = this.describe(described);
        const stream = this.client.subscribe({ gatewayId: this.options.gatewayId }, { signal: this.attempt.signal });
        for await (const message of stream) {
          this.receive(message, linked);
          waitMs = firstReconnectMs;
        }
        this.disconnect("its stream ended");
      } catch (error) {
        const { message, code } = toClusterError(error);
        // Once for each reason: it is tried again every two seconds.
        if (!this.closing.signal.aborted && message !== this.lastProblem) {
          this.lastProblem = message;
          log.warn({ worker: this.id, address: this.address, code, reason: message }, "no stream from the worker");
        }
        this.disconnect(message);
      }
      await delay(waitMs, undefined, { signal: this.closing.signal }).catch(() => undefined);
      waitMs = Math.min(lastReconnectMs, waitMs * 2);
    }
  }

  private describe(described: GetModelResponse): LinkedModel {
    return {
      model: this.options.events.described(described),
      kvFormat: described.kvFormat,
      kvFormatId: described.kvFormatId,
      blockTokens: described.blockTokens,
      residualTokens: described.residualTokens,
      blockBytes: Number(described.blockBytes),
      device: described.device,
    };
  }

  private receive(message: SubscribeResponse, linked: LinkedModel): void {
    const { event } = message;
    if (this.linked === undefined) {
      // The first event proves that the worker has registered this gateway.
      this.linked = linked;
      this.load = event.case === "load" ? event.value : undefined;
      this.options.log.info({ worker: this.id, model: linked.model.name, device: linked.device }, "worker joined");
      this.options.events.joined(this.id);
    }
    switch (event.case) {
      case "tokens":
        this.options.events.tokens(this.id, event.value);
        break;
      case "finished":
        this.options.events.finished(this.id, event.value);
        break;
      case "load":
        this.load = event.value;
        break;
      case "prefix":
        this.changePrefixes(event.value);
        break;
      default:
        // A kind of event that a newer worker sends.
        break;
    }
  }

  private changePrefixes(change: PrefixChange): void {
    if (change.cleared) {
      this.held.clear();
    }
    for (const id of change.removed) {
      this.held.delete(hex(id));
    }
    for (const id of change.added) {
      if (this.held.size < maxHeldBlocks) {
        this.held.add(hex(id));
      }
    }
  }

  private disconnect(reason: string): void {
    this.attempt?.abort();
    this.held.clear();
    this.load = undefined;
    if (this.linked !== undefined) {
      this.linked = undefined;
      this.options.events.lost(this.id, reason);
    }
  }
}
