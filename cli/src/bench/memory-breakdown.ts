/** GPU bytes of an open runner, by use. All of them are taken when it opens: what it has is its peak. */
import type { ModelRunner } from "@kivimesh/worker";

export interface MemoryBreakdown {
  readonly weights: number;
  /** `kvPages` and `kvResidual` together. */
  readonly kv: number;
  /** Sealed blocks of all layers. */
  readonly kvPages: number;
  /** f16 windows of the newest tokens. */
  readonly kvResidual: number;
  readonly activations: number;
  readonly other: number;
  readonly total: number;
}

export function memoryBreakdown(runner: ModelRunner): MemoryBreakdown {
  const { weights, kv, activations, other } = runner.memory();
  const kvPages = runner.limits.numPages * runner.kv.blockBytes;
  const total = weights + kv + activations + other;
  return { weights, kv, kvPages, kvResidual: kv - kvPages, activations, other, total };
}
