/** Log-probabilities of given tokens at every prefill row, for perplexity: slabs of rows through the head. */
import type { Gpu } from "@kivimesh/kernels";
import { gentleWait } from "./gentle-wait.ts";
import type { MemoryAccount } from "./memory-account.ts";
import type { OutputHead } from "./output-head.ts";

/** Rows whose logits are on the host at once. */
const SCORE_ROWS = 32;

/** Log of the softmax of `logits` at `target`, summed in f64. */
export function logSoftmaxAt(logits: Float32Array, target: number): number {
  let largest = Number.NEGATIVE_INFINITY;
  for (const logit of logits) if (logit > largest) largest = logit;
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - largest);
  return (logits[target] as number) - largest - Math.log(sum);
}

export class PromptScorer {
  readonly #gpu: Gpu;
  readonly #head: OutputHead;
  readonly #vocabulary: number;
  readonly #rows: number;
  readonly #memory: MemoryAccount;
  #staging: GPUBuffer | undefined;

  /** @param head of the prefill phase. */
  constructor(gpu: Gpu, memory: MemoryAccount, head: OutputHead, vocabulary: number) {
    this.#gpu = gpu;
    this.#memory = memory;
    this.#head = head;
    this.#vocabulary = vocabulary;
    this.#rows = Math.min(SCORE_ROWS, head.slabRows);
  }

  /** @param firstRow row of the residual stream, left by a prefill phase, that predicts targets[0]. */
  async score(firstRow: number, targets: Uint32Array): Promise<Float32Array> {
    const vocabulary = this.#vocabulary;
    this.#staging ??= this.#memory.staging("other", "scored logits", this.#rows * vocabulary * 4);
    const staging = this.#staging;
    const logprobs = new Float32Array(targets.length);
    for (let first = 0; first < targets.length; first += this.#rows) {
      const count = Math.min(this.#rows, targets.length - first);
      const encoder = this.#gpu.device.createCommandEncoder();
      this.#head.encodeLogits(encoder, firstRow + first, count, staging);
      this.#gpu.device.queue.submit([encoder.finish()]);
      await gentleWait(staging.mapAsync(GPUMapMode.READ, 0, count * vocabulary * 4), this.#gpu.profile === "software");
      const logits = new Float32Array(staging.getMappedRange(0, count * vocabulary * 4));
      for (let i = 0; i < count; i++) {
        const row = logits.subarray(i * vocabulary, (i + 1) * vocabulary);
        logprobs[first + i] = logSoftmaxAt(row, targets[first + i] as number);
      }
      staging.unmap();
    }
    return logprobs;
  }
}
