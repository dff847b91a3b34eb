/** What main thread and engine thread say to each other. Payloads are transferred, not copied. */
import type { ErrorCode } from "@kivimesh/proto";
import type { BlockFetch, FetchReport, SealedBlock } from "./block-transfer.ts";
import type { EngineConfig } from "./config.ts";
import type { EngineStats } from "./engine-stats.ts";
import type { GenerationEvent, GenerationRequest } from "./generation.ts";
import type { KvGeometry, RunnerDevice, RunnerLimits, TokenizerDefinition } from "./model/index.ts";
import type { PrefixIndexChange } from "./page-pool.ts";

/** What the engine thread starts with. */
export interface EngineThreadData {
  readonly config: EngineConfig;
}

/** What an engine serves. */
export interface ModelDescription {
  readonly name: string;
  /** 32 bytes. */
  readonly digest: Uint8Array;
  readonly tokenizer: TokenizerDefinition;
  readonly kv: KvGeometry;
  readonly limits: RunnerLimits;
  readonly device: RunnerDevice;
}

export interface PlainError {
  readonly code: ErrorCode;
  readonly message: string;
}

export type ToEngine =
  | { readonly type: "submit"; readonly request: GenerationRequest }
  | { readonly type: "abort"; readonly requestId: string; readonly epoch: number }
  | { readonly type: "drain" }
  | { readonly type: "read"; readonly readId: number; readonly id: string }
  | { readonly type: "stats"; readonly statsId: number }
  | { readonly type: "block"; readonly fetchId: number; readonly id: string; readonly payload: Uint8Array }
  | { readonly type: "fetchEnded"; readonly fetchId: number; readonly report: FetchReport }
  | { readonly type: "close" };

export type FromEngine =
  | { readonly type: "progress"; readonly done: number; readonly total: number }
  | { readonly type: "ready"; readonly model: ModelDescription; readonly stats: EngineStats }
  | { readonly type: "events"; readonly events: readonly GenerationEvent[] }
  | { readonly type: "prefix"; readonly change: PrefixIndexChange }
  /** Unasked: at most every `statsIntervalMs`. */
  | { readonly type: "stats"; readonly statsId?: number; readonly stats: EngineStats }
  | { readonly type: "read"; readonly readId: number; readonly payload?: Uint8Array; readonly error?: PlainError }
  | { readonly type: "fetch"; readonly fetch: BlockFetch }
  | { readonly type: "sealed"; readonly blocks: readonly SealedBlock[] }
  | { readonly type: "failed"; readonly error: PlainError }
  | { readonly type: "closed" };

/** Least time between two unasked reports of an engine thread, in milliseconds. */
export const statsIntervalMs = 100;

/** The buffers to transfer with a message: those that nobody else looks at. */
export function transferList(...payloads: readonly (Uint8Array | Float32Array | undefined)[]): ArrayBuffer[] {
  return payloads.flatMap((payload) =>
    payload !== undefined && payload.buffer instanceof ArrayBuffer && payload.byteLength === payload.buffer.byteLength
      ? [payload.buffer]
      : [],
  );
}
