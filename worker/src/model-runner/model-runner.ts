/**
 * The model runner: executes steps of prefill chunks and decode rows on the GPU. It owns the page buffers and the
 * residual windows, addressed by page number and slot; which sequence owns what is its caller's business.
 */
import type { DeviceProfile, Gpu, GpuFeatures, KvFormat } from "@kivimesh/kernels";
import type { LoadedModel } from "../model/loaded-model.ts";
import type { ModelConfig } from "../model/model-config.ts";

export interface KvGeometry {
  readonly format: KvFormat;
  readonly formatId: number;
  readonly layers: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly blockTokens: number;
  readonly residualTokens: number;
  /** Bytes of one sealed block, all layers. */
  readonly blockBytes: number;
  /** What one token's K and V would take as f16, all layers. */
  readonly f16BytesPerToken: number;
  /** Stored bits of one K or V element, scales, zeros and norms included. */
  readonly bitsPerElement: number;
}

export interface RunnerLimits {
  /** Pages in the pool; a block takes one page number in every layer. */
  readonly numPages: number;
  /** Slots: sequences that can hold a residual window at once; also the most decode rows in a step. */
  readonly maxSequences: number;
  /** Most prefill rows in a step, all chunks together. */
  readonly maxPrefillRows: number;
  readonly maxPagesPerSequence: number;
  readonly maxContextTokens: number;
  readonly vocabulary: number;
  /** Most tokens that a plan's decode rows can generate one after the other. */
  readonly maxDecodeSteps: number;
  /** Plans that may be under way at once. */
  readonly maxStepsInFlight: number;
}

export interface SamplingParameters {
  /** 0: greedy. */
  readonly temperature: number;
  /** 0: all tokens. */
  readonly topK: number;
  /** In (0, 1]; 1: all tokens. */
  readonly topP: number;
  /** u64. With the position it fixes the random number of a token. */
  readonly seed: bigint;
}

/** Consecutive prompt tokens of one sequence. */
export interface PrefillChunk {
  readonly slot: number;
  readonly tokens: Uint32Array;
  /** Position of the first token: a multiple of residualTokens. */
  readonly position: number;
  /** Page of every block from the sequence's start, those that this chunk seals included. */
  readonly pageTable: readonly number[];
  /** On the prompt's last chunk: samples the next token from its last row. */
  readonly sample?: SamplingParameters;
  /** With `sample`: also returns the logits it was sampled from. */
  readonly returnLogits?: boolean;
  /** Target token of every row: returns their log-probabilities. */
  readonly score?: Uint32Array;
}

/** One sequence's next token. */
export interface DecodeRow {
  readonly slot: number;
  /** Left out: the token sampled last for this slot, which need not have been read yet. */
  readonly token?: number | undefined;
  readonly position: number;
  /** As in PrefillChunk; includes the pages of every window that is full after the plan's steps. */
  readonly pageTable: readonly number[];
  readonly sample: SamplingParameters;
  readonly returnLogits?: boolean;
}

/** Slots must be distinct over the whole plan. */
export interface StepPlan {
  readonly prefill: readonly PrefillChunk[];
  readonly decode: readonly DecodeRow[];
  /**
   * How often the decode rows run: each time on the token that they sampled before, at the next position. Default 1, and
   * always 1 where logits are asked for.
   */
  readonly decodeSteps?: number;
}

export interface SampledToken {
  readonly slot: number;
  readonly token: number;
  /** Of the token under the unmodified softmax. */
  readonly logprob: number;
  /** f32 [vocabulary], where asked for. */
  readonly logits?: Float32Array;
}

export interface StepResult {
  /** Prefill chunks that sample, in plan order, then the decode rows of each decode step. */
  readonly sampled: readonly SampledToken[];
  readonly scores: readonly { readonly slot: number; readonly logprobs: Float32Array }[];
  /** Slots whose K, V or logits were NaN or infinite: their sequences must fail and their pages must not be shared. */
  readonly nonFiniteSlots: readonly number[];
  readonly seconds: StepSeconds;
}

export interface StepSeconds {
  /** On the host, until the GPU had everything. */
  readonly encode: number;
  /** From the call to the result, work of earlier plans included. */
  readonly wall: number;
  /** On the GPU, by its clock; undefined where it has none or logits were asked for. */
  readonly gpu: number | undefined;
}

/** GPU bytes by use. */
export interface RunnerMemory {
  readonly weights: number;
  readonly kv: number;
  readonly activations: number;
  readonly other: number;
}

/** The GPU, and what kernel variants were picked by. */
export interface RunnerDevice {
  readonly name: string;
  readonly profile: DeviceProfile;
  readonly features: GpuFeatures;
  /** Kernel variants that the start-up self-test refused, and why; plain ones run instead. */
  readonly fallbacks: NonNullable<Gpu["fallbacks"]>;
}

export interface ModelRunner {
  readonly config: ModelConfig;
  readonly kv: KvGeometry;
  readonly limits: RunnerLimits;
  readonly device: RunnerDevice;
  /** Resolves with the reason when the device is lost. */
  readonly lost: Promise<string>;
  /**
   * Runs one plan. Plans run in the order of the calls, and each sees all that those before it wrote; up to
   * `limits.maxStepsInFlight` may be under way, but none beside one that scores.
   * @throws ClusterError INVALID_ARGUMENT for a plan over a limit, DEVICE_LOST.
   */
  step(plan: StepPlan): Promise<StepResult>;
  /** Bytes of a sealed block as they lie in the pages of all layers, layer after layer. */
  readBlock(page: number): Promise<Uint8Array>;
  /** Puts such bytes into a page of all layers: after the plans under way, before the next one. */
  writeBlock(page: number, payload: Uint8Array): void;
  memory(): RunnerMemory;
  close(): Promise<void>;
}

export interface OpenModelRunnerOptions {
  readonly model: LoadedModel;
  /** Default: kivi2r. */
  readonly kvFormat?: string;
  /** Default: 128. */
  readonly blockTokens?: number;
  /** Default: 128; a multiple of blockTokens. */
  readonly residualTokens?: number;
  /** Default: 8. */
  readonly maxSequences?: number;
  /** Default: 512. */
  readonly maxPrefillRows?: number;
  /** GPU bytes for sealed pages. Default: enough for every slot at the full context, at most 512 MiB. */
  readonly kvBytes?: number;
  /** Default: the model's context, at most 8192. */
  readonly maxContextTokens?: number;
  /** Default: 16. */
  readonly maxDecodeSteps?: number;
  /**
   * `invariant`, the default: a row's bits depend on its own sequence only. `fast`: kernels may be chosen by the number
   * of rows.
   */
  readonly numerics?: "invariant" | "fast";
  /** For tests: takes the path of devices with subgroup matrices, whose products are written out. Slow. */
  readonly emulatedMatrices?: boolean;
  /** Default: opened here and closed with the runner. */
  readonly gpu?: Gpu;
  /** Bytes of weights uploaded so far and in all. */
  readonly onProgress?: (done: number, total: number) => void;
}
