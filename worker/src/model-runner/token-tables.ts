/** Which slot each row belongs to, and the tokens on the GPU: those that rows start from and those sampled last. */
import {
  type BoundTokenLoad,
  createTokenFeedback,
  FEEDBACK_ROW_WORDS,
  type Gpu,
  TOKEN_OF_SLOT,
} from "@kivimesh/kernels";
import type { MemoryAccount } from "./memory-account.ts";
import type { DecodeRow } from "./model-runner.ts";
import type { HeadFeedback } from "./output-head.ts";

export interface TokenTables {
  /** For the heads of both phases. */
  readonly prefill: HeadFeedback;
  readonly decode: HeadFeedback;
  /** Fills the tokens that the decode rows start from; after `uploadDecode`. */
  readonly load: BoundTokenLoad;
  uploadDecode(rows: readonly DecodeRow[]): void;
  /** @param slots of the rows that sample, in the head's order. */
  uploadPrefill(slots: readonly number[]): void;
}

/** @param decodeTokens u32 [maxSequences]: input of the decode rows' embedding. @param log results of all steps. */
export async function createTokenTables(
  gpu: Gpu,
  memory: MemoryAccount,
  decodeTokens: GPUBuffer,
  log: GPUBuffer,
  maxSequences: number,
): Promise<TokenTables> {
  const kernels = await createTokenFeedback(gpu);
  const words = (label: string, each: number) => memory.storage("other", label, maxSequences * each * 4);
  const slotTokens = words("slot tokens", 1);
  const decode = { kernels, slotTokens, log, rows: words("decode slots", FEEDBACK_ROW_WORDS), tokens: decodeTokens };
  const prefillRows = words("prefill slots", FEEDBACK_ROW_WORDS);
  const prefill = { kernels, slotTokens, log, rows: prefillRows, tokens: words("prefilled tokens", 1) };
  const host = new Uint32Array(maxSequences * FEEDBACK_ROW_WORDS);
  const upload = (target: GPUBuffer, rows: number) => {
    gpu.device.queue.writeBuffer(target, 0, host, 0, rows * FEEDBACK_ROW_WORDS);
  };
  return {
    prefill,
    decode,
    load: kernels.bindLoad(decode),
    uploadDecode(rows) {
      let at = 0;
      for (const { slot, token = TOKEN_OF_SLOT } of rows) {
        host[at] = slot;
        host[at + 1] = token;
        at += FEEDBACK_ROW_WORDS;
      }
      upload(decode.rows, rows.length);
    },
    uploadPrefill(slots) {
      slots.forEach((slot, row) => {
        host[row * FEEDBACK_ROW_WORDS] = slot;
      });
      upload(prefill.rows, slots.length);
    },
  };
}
