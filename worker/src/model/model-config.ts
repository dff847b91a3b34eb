/** Shape of a Llama-family model, the same whatever file it came from. */
import type { RopeLayout, RopeScaling } from "@kivimesh/kernels";

export interface ModelConfig {
  /** Architecture family; the runner knows one. */
  readonly architecture: "llama";
  readonly layers: number;
  /** Width of the residual stream. */
  readonly hidden: number;
  /** Width of the gated feed-forward. */
  readonly feedForward: number;
  readonly heads: number;
  /** Key and value heads; `heads` for MHA, 1 for MQA. Divides `heads`. */
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocabulary: number;
  /** Longest sequence the model was made for, in tokens. */
  readonly contextTokens: number;
  readonly normEpsilon: number;
  readonly rope: RopeConfig;
  /** The head's matrix is the embedding's. */
  readonly tiedEmbedding: boolean;
}

export interface RopeConfig {
  readonly theta: number;
  /** Dimensions of a head that turn. */
  readonly dimensions: number;
  readonly layout: RopeLayout;
  readonly scaling?: RopeScaling;
  /** Divisors of the frequencies, one a pair (GGUF `rope_freqs.weight`). */
  readonly frequencyFactors?: readonly number[];
}
