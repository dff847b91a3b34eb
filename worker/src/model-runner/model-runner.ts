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
  readonly token: number;
  readonly position: number;
  /** As in PrefillChunk; includes the pages that the window seals into where (position + 1) % residualTokens is 0. */
  readonly pageTable: readonly number[];
  readonly sample: SamplingParameters;
  readonly returnLogits?: boolean;
}

/** Slots must be distinct over the whole plan. */
export interface StepPlan {
  readonly prefill: readonly PrefillChunk[];
  readonly decode: readonly DecodeRow[];
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
  /** Prefill chunks that sample, in plan order, then the decode rows. */
  readonly sampled: readonly SampledToken[];
  readonly scores: readonly { readonly slot: number; readonly logprobs: Float32Array }[];
  /** Slots whose K, V or logits were NaN or infinite: their sequences must fail and their pages must not be shared. */
  readonly nonFiniteSlots: readonly number[];
  /** Seconds on the host while encoding, and from the call to the result. */
  readonly seconds: { readonly encode: number; readonly wall: number };
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
}

export interface ModelRunner {
  readonly config: ModelConfig;
  readonly kv: KvGeometry;
  readonly limits: RunnerLimits;
  readonly device: RunnerDevice;
  /** Resolves with the reason when the device is lost. */
  readonly lost: Promise<string>;
  /**
   * Runs one step. Steps are serialized: call again only after the previous one settled.
   * @throws ClusterError INVALID_ARGUMENT for a plan over a limit, DEVICE_LOST.
   */
  step(plan: StepPlan): Promise<StepResult>;
  /** Bytes of a sealed block as they lie in the pages of all layers, layer after layer. */
  readBlock(page: number): Promise<Uint8Array>;
  /** Puts such bytes into a page of all layers; takes effect before the next step. */
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
  /** Default: opened here and closed with the runner. */
  readonly gpu?: Gpu;
  /** Bytes of weights uploaded so far and in all. */
  readonly onProgress?: (done: number, total: number) => void;
}
