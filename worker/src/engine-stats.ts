/** What an engine tells about itself. Plain data: it crosses the thread boundary. */
import type { RunnerMemory } from "./model/index.ts";

/** Counters grow from the engine's start; gauges are of now. */
export interface EngineStats {
  readonly running: number;
  /** Waiting sequences, those whose blocks are being fetched included. */
  readonly waiting: number;
  readonly waitingPromptTokens: number;
  /** Free pages and pages that only the prefix index holds. */
  readonly freePages: number;
  readonly totalPages: number;
  /** Pages that a sequence or a transfer holds. */
  readonly referencedPages: number;
  /** Blocks in the prefix index. */
  readonly indexedBlocks: number;
  /** Empty when the page pool and the sequences agree. */
  readonly integrityViolations: readonly string[];
  readonly memory: RunnerMemory;
  /** Measured; 0 until known. */
  readonly prefillTokensPerSecond: number;
  readonly steps: number;
  readonly prefillTokens: number;
  readonly decodeTokens: number;
  readonly preemptions: number;
  readonly evictedPages: number;
  /** Prompt tokens by where their KV came from, over all finished requests. */
  readonly promptTokensBySource: {
    readonly gpu: number;
    readonly peer: number;
    readonly cachestore: number;
    readonly computed: number;
  };
  /** Submits: one may hold several decode steps. */
  readonly submits: number;
  /**
   * Seconds over all submits: `host` of the engine's thread in planning, encoding and handing out; `encode` of that in
   * the runner, until the GPU had everything; `gpu` on the GPU by its clock, 0 where it has none.
   */
  readonly submitSeconds: { readonly host: number; readonly encode: number; readonly gpu: number };
  /** Wall seconds spent in steps, by what they held; steps under way at once are not counted twice. */
  readonly stepSeconds: { readonly prefill: number; readonly decode: number; readonly mixed: number };
}
