import type { ClusterError, Usage } from "@kivimesh/proto";
import type { ServedModel } from "./served-model.ts";
import { TokenLedger } from "./token-ledger.ts";

/** A request in tokens, ready to run. */
export interface TokenRequest {
  readonly model: ServedModel;
  readonly prompt: readonly number[];
  readonly maxTokens: number;
  readonly temperature: number;
  readonly topP: number;
  readonly topK: number;
  readonly seed: bigint;
  readonly stopTokenIds: readonly number[];
  readonly tenantNamespace: Uint8Array;
  readonly returnFirstLogits: boolean;
  /** "": any. */
  readonly workerId: string;
  /** For logs. */
  readonly clientRequestId: string;
}

/** What a running request gives its reader, in order; exactly one `finished` ends it. */
export type TokenEvent =
  | { readonly kind: "tokens"; readonly ids: readonly number[]; readonly firstLogits: Uint8Array | undefined }
  | { readonly kind: "finished"; readonly outcome: RequestOutcome; readonly usage: Usage };

export type RequestOutcome = "stop" | "length" | "cancelled";

/** One request over all its attempts: the state that the coordinator drives, and the events that its reader takes. */
export class RunningRequest {
  readonly id: string;
  readonly request: TokenRequest;
  readonly ledger = new TokenLedger();
  readonly startedMs: number;
  /** Where the current attempt runs. */
  workerId = "";
  /** KV format of that worker: later attempts prefer the same. */
  kvFormat = "";
  /** Workers that refused an attempt. */
  readonly refusedBy = new Set<string>();
  /** Asked to end: the next `finished` of the worker ends it. */
  stopping: { readonly outcome: RequestOutcome; readonly tokens: number } | undefined;
  /** Ended for its reader. */
  done = false;
  firstTokenMs: number | undefined;
  lastTokenMs: number | undefined;
  // Holds at most maxTokens tokens and one end, however slow the reader is.
  private readonly events: TokenEvent[] = [];
  private failure: ClusterError | undefined;
  private wake: (() => void) | undefined;

  constructor(id: string, request: TokenRequest, startedMs: number) {
    this.id = id;
    this.request = request;
    this.startedMs = startedMs;
  }

  /** Tokens that may still be generated. */
  get remaining(): number {
    return this.request.maxTokens - this.ledger.tokens.length;
  }

  push(event: TokenEvent): void {
    this.events.push(event);
    this.wake?.();
  }

  /** Ends the request with an error after the events so far. */
  fail(error: ClusterError): void {
    this.failure ??= error;
    this.wake?.();
  }

  /** The events, once. Ends after `finished`; throws the ClusterError that ended the request otherwise. */
  async *read(): AsyncGenerator<TokenEvent, void, undefined> {
    for (;;) {
      const event = this.events.shift();
      if (event !== undefined) {
        yield event;
        if (event.kind === "finished") return;
        continue;
      }
      if (this.failure !== undefined) {
        throw this.failure;
      }
      await new Promise<void>((resolve) => {
        this.wake = resolve;
      });
      this.wake = undefined;
    }
  }
}
