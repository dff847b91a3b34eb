/** A step's command encoder: one compute pass, unless copies come between dispatches. */
import type { ReadbackEntry } from "./step-readback.ts";

export class StepPass {
  readonly encoder: GPUCommandEncoder;
  readonly #descriptor: GPUComputePassDescriptor | undefined;
  #pass: GPUComputePassEncoder | undefined;

  /** @param timed where the times of the pass go; only for steps without copies. */
  constructor(device: GPUDevice, timed?: ReadbackEntry) {
    this.encoder = device.createCommandEncoder();
    if (timed?.querySet === undefined) return;
    const { querySet } = timed;
    this.#descriptor = { timestampWrites: { querySet, beginningOfPassWriteIndex: 0, endOfPassWriteIndex: 1 } };
  }

  get pass(): GPUComputePassEncoder {
    this.#pass ??= this.encoder.beginComputePass(this.#descriptor);
    return this.#pass;
  }

  /** Ends the pass, for copies; the next dispatch begins another. */
  end(): void {
    this.#pass?.end();
    this.#pass = undefined;
  }
}
