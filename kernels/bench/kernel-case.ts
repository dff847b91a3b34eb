/**
 * One kernel at one shape, as the bench runs it: checked against an f64 reference, then timed, then set against a roof
 * and a peer. Files in `cases/` make lists of these; see `cases/case-lists.ts`.
 */
import type { Gpu } from "../src/index.ts";

/** `full`: the shapes that are reported, for a GPU. `tiny`: the same kernels in milliseconds on a software driver. */
export type CaseSize = "full" | "tiny";

/** What limits the kernel at best: bytes of GPU memory, products of matrices, or f32 multiply-adds outside of them. */
export type CaseRoof = "bytes" | "matrix" | "multiply-adds";

export interface KernelCase {
  /** What runs, such as "decode attention". The bench's filter matches kernel, shape, format and variant. */
  readonly kernel: string;
  /** Such as "64 × 4096, 32/32, d128". */
  readonly shape: string;
  /** Format of the KV cache, where the kernel reads or writes one. Weights' formats belong in `kernel`: "GEMV q4". */
  readonly kvFormat?: string;
  /** Which of several kernels for the same work: "matrix", "packed", "splits by batch". */
  readonly variant: string;
  readonly numerics: "invariant" | "fast";
  /** Bytes that one run must read and write at least, each once. */
  readonly bytes: number;
  /** Operations of one run at least; a multiply-add counts two. */
  readonly flops: number;
  readonly roof: CaseRoof;
  /** Key of what does the same elsewhere, in the file that `peers.py` writes. */
  readonly peer?: string;
  /** What must be reached, in words that {@link meetsFloor} reads: "≥ 3.9 × peer", "≥ 2.2 TB/s", "≤ 0.06 ms". */
  readonly floor?: string;
  /** Makes pipelines and buffers with random data. A case is prepared, used and destroyed before the next one. */
  prepare(gpu: Gpu): Promise<PreparedCase>;
}

export interface PreparedCase {
  /**
   * Encodes one run: all dispatches of it. It may take other buffers each time, so that the data do not stay in the
   * chip's cache; `check` must know which run wrote what.
   */
  encode(pass: GPUComputePassEncoder): void;
  /** Fills the outputs (and scratch) with NaN. */
  poison(): void;
  /**
   * Reads what the last run wrote and compares sampled outputs with a reference in f64 over the same stored inputs.
   * @returns relative error, ‖got − want‖₂ / ‖want‖₂; NaN where an output was not written.
   */
  check(): Promise<number>;
  /** The largest relative error that is right. */
  readonly tolerance: number;
  destroy(): void;
}

/** What each file in `cases/` exports, named after its kernel: `decodeAttentionCases`. */
export type CaseList = (size: CaseSize) => readonly KernelCase[];
