/** Brings a step's results to the host: sampled tokens and KV status in one mapped buffer, logits where asked for. */
import { readSampleResult, SAMPLE_RESULT_BYTES, type SampleResult } from "@kivimesh/kernels";
import type { MemoryAccount } from "./memory-account.ts";
import type { RunnerLimits } from "./model-runner.ts";

export class StepReadback {
  readonly #memory: MemoryAccount;
  readonly #limits: RunnerLimits;
  readonly #results: GPUBuffer;
  #logits: GPUBuffer | undefined;

  constructor(memory: MemoryAccount, limits: RunnerLimits) {
    this.#memory = memory;
    this.#limits = limits;
    const bytes = limits.maxSequences * (SAMPLE_RESULT_BYTES + 4);
    this.#results = memory.staging("other", "step results", bytes);
  }

  /** Sample results from row 0; a step has at most one a slot. */
  get results(): GPUBuffer {
    return this.#results;
  }

  /** f32 [maxSequences][vocabulary]; made at first use, because few ever ask. */
  get logits(): GPUBuffer {
    this.#logits ??= this.#memory.staging(
      "other",
      "logits for the host",
      this.#limits.maxSequences * this.#limits.vocabulary * 4,
    );
    return this.#logits;
  }

  get logitsRowBytes(): number {
    return this.#limits.vocabulary * 4;
  }

  encodeStatus(encoder: GPUCommandEncoder, status: GPUBuffer): void {
    const { maxSequences } = this.#limits;
    encoder.copyBufferToBuffer(status, 0, this.#results, maxSequences * SAMPLE_RESULT_BYTES, maxSequences * 4);
  }

  /** Waits for the submitted step. @param rows sampled rows. @param logitsRows rows of logits copied. */
  async read(rows: number, logitsRows: number) {
    const waits = [this.#results.mapAsync(GPUMapMode.READ)];
    if (logitsRows > 0) waits.push(this.logits.mapAsync(GPUMapMode.READ, 0, logitsRows * this.logitsRowBytes));
    await Promise.all(waits);
    const view = new DataView(this.#results.getMappedRange());
    const { maxSequences, vocabulary } = this.#limits;
    const sampled: SampleResult[] = Array.from({ length: rows }, (_, row) => readSampleResult(view, row));
    const status = Uint32Array.from({ length: maxSequences }, (_, slot) =>
      view.getUint32(maxSequences * SAMPLE_RESULT_BYTES + slot * 4, true),
    );
    this.#results.unmap();
    const logits: Float32Array[] = [];
    if (logitsRows > 0) {
      const all = new Float32Array(this.logits.getMappedRange(0, logitsRows * this.logitsRowBytes));
      for (let row = 0; row < logitsRows; row++) logits.push(all.slice(row * vocabulary, (row + 1) * vocabulary));
      this.logits.unmap();
    }
    return { sampled, status, logits };
  }
}
