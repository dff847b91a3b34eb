/**
 * Poisoned outputs with canaries: every word of a tested buffer starts as NaN, and the words behind the part that a
 * kernel may write must still hold the canary afterwards.
 */
import { createStorage, readBuffer } from "../buffers.ts";
import type { Gpu } from "../device.ts";

/** A quiet NaN as f32, and an impossible index as u32. */
export const POISON_WORD = 0x7fc0_dead;
const CANARY_WORD = 0x7fc0_cafe;
const CANARY_WORDS = 64;

export interface PoisonedBuffer {
  readonly buffer: GPUBuffer;
  /** Reads the payload. @throws Error where a canary behind it was overwritten. */
  read(): Promise<ArrayBuffer>;
  /** Poisons the payload again. */
  reset(): void;
}

/** Buffer of `bytes` (a multiple of 4) poison followed by 64 canary words. */
export function createPoisoned(gpu: Gpu, label: string, bytes: number): PoisonedBuffer {
  if (bytes % 4 !== 0) throw new RangeError(`${label}: ${bytes} bytes, must be a multiple of 4`);
  const words = new Uint32Array(bytes / 4 + CANARY_WORDS);
  words.fill(POISON_WORD, 0, bytes / 4);
  words.fill(CANARY_WORD, bytes / 4);
  const buffer = createStorage(gpu, label, words.byteLength);
  const reset = () => gpu.device.queue.writeBuffer(buffer, 0, words);
  reset();
  return {
    buffer,
    reset,
    async read() {
      const content = await readBuffer(gpu, buffer);
      const canaries = new Uint32Array(content, bytes, CANARY_WORDS);
      const broken = canaries.findIndex((word) => word !== CANARY_WORD);
      if (broken >= 0) throw new Error(`${label}: word ${broken} behind the end was overwritten`);
      return content.slice(0, bytes);
    },
  };
}

/** @throws Error where any word still holds the poison. */
export function assertNoPoison(context: string, content: ArrayBuffer): void {
  const index = new Uint32Array(content).indexOf(POISON_WORD);
  if (index >= 0) throw new Error(`${context}: word ${index} was never written`);
}
