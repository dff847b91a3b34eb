/**
 * Keeps sampled tokens on the GPU: what a step samples for a slot is what the slot's next decode row reads, so that
 * steps can follow each other without the host. Every result is also logged, for one readback after many steps.
 */
import type { Gpu } from "./device.ts";
import { cachedKernel } from "./kernel-cache.ts";
import {
  FEEDBACK_THREADS,
  LOAD_IMMEDIATE_BYTES,
  STORE_IMMEDIATE_BYTES,
  tokenLoadWgsl,
  tokenStoreWgsl,
} from "./token-feedback.wgsl.ts";

/** In the row table: the token is the one that was sampled last for the slot. */
export const TOKEN_OF_SLOT = 0xffff_ffff;
/** Words of a row: slot, token or TOKEN_OF_SLOT. */
export const FEEDBACK_ROW_WORDS = 2;

export interface TokenLoadBuffers {
  /** u32 [rows][2]: slot, token or TOKEN_OF_SLOT. */
  readonly rows: GPUBuffer;
  /** u32 [slots]: the token sampled last. */
  readonly slotTokens: GPUBuffer;
  /** u32 [rows]: the tokens that the rows start from. */
  readonly tokens: GPUBuffer;
}

export interface TokenStoreBuffers extends TokenLoadBuffers {
  /** The sampler's results, SAMPLE_RESULT_BYTES a row, from the first row of the dispatch. */
  readonly results: GPUBuffer;
  /** The sampler's parameters, SAMPLE_PARAMETER_BYTES a row, likewise: each position moves on by one. */
  readonly parameters: GPUBuffer;
  /** Results of all rows and steps, SAMPLE_RESULT_BYTES each. */
  readonly log: GPUBuffer;
}

export interface BoundTokenLoad {
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

export interface BoundTokenStore {
  /**
   * Result i is that of row `first + i`: of `rows`, of `tokens` (where the next step reads it) and, counted from entry
   * `log`, of the log.
   */
  encode(pass: GPUComputePassEncoder, first: number, rows: number, log: number): void;
}

export interface TokenFeedback {
  bindLoad(buffers: TokenLoadBuffers): BoundTokenLoad;
  bindStore(buffers: TokenStoreBuffers): BoundTokenStore;
}

export async function createTokenFeedback(gpu: Gpu): Promise<TokenFeedback> {
  const [load, store] = await Promise.all([
    cachedKernel(gpu, {
      label: "token load",
      code: tokenLoadWgsl(TOKEN_OF_SLOT),
      bindings: ["read", "read", "read_write"],
      immediateBytes: LOAD_IMMEDIATE_BYTES,
    }),
    cachedKernel(gpu, {
      label: "token store",
      code: tokenStoreWgsl(),
      bindings: ["read", "read", "read_write", "read_write", "read_write", "read_write"],
      immediateBytes: STORE_IMMEDIATE_BYTES,
    }),
  ]);
  return {
    bindLoad({ rows, slotTokens, tokens }) {
      const bound = load.bind([rows, slotTokens, tokens]);
      const immediates = new Uint32Array(1);
      return {
        encode(pass, count) {
          immediates[0] = count;
          bound.encode(pass, immediates, [Math.ceil(count / FEEDBACK_THREADS)]);
        },
      };
    },
    bindStore({ results, rows, slotTokens, tokens, parameters, log }) {
      const bound = store.bind([results, rows, slotTokens, tokens, parameters, log]);
      const immediates = new Uint32Array(3);
      return {
        encode(pass, first, count, firstOfLog) {
          immediates[0] = first;
          immediates[1] = count;
          immediates[2] = firstOfLog;
          bound.encode(pass, immediates, [Math.ceil(count / FEEDBACK_THREADS)]);
        },
      };
    },
  };
}
