/** Model shape from GGUF metadata (key names: the GGUF specification's `llama.*`). */

import type { RopeScaling } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { GgufFile, GgufMetadata } from "./gguf-file.ts";
import type { ModelConfig, RopeConfig } from "./model-config.ts";

/** Reads metadata fields and names them in errors. */
export class GgufFields {
  readonly #path: string;
  readonly #metadata: GgufMetadata;

  constructor(path: string, metadata: GgufMetadata) {
    this.#path = path;
    this.#metadata = metadata;
  }

  has(key: string): boolean {
    return this.#metadata[key] !== undefined;
  }

  number(key: string, fallback?: number): number {
    const value = this.#metadata[key];
    if (value === undefined && fallback !== undefined) return fallback;
    if (typeof value === "bigint") return Number(value);
    if (typeof value === "number") return value;
    throw this.invalid(key, value, "a number");
  }

  positive(key: string, fallback?: number): number {
    const value = this.number(key, fallback);
    if (Number.isInteger(value) && value > 0) return value;
    throw this.invalid(key, value, "a positive integer");
  }

  text(key: string, fallback?: string): string {
    const value = this.#metadata[key] ?? fallback;
    if (typeof value === "string") return value;
    throw this.invalid(key, value, "a string");
  }

  flag(key: string, fallback: boolean): boolean {
    const value = this.#metadata[key] ?? fallback;
    if (typeof value === "boolean") return value;
    throw this.invalid(key, value, "true or false");
  }

  texts(key: string): readonly string[] {
    const value = this.#metadata[key];
    if (Array.isArray(value) && value.every((item) => typeof item === "string")) return value;
    throw this.invalid(key, value, "an array of strings");
  }

  numbers(key: string): readonly number[] {
    const value = this.#metadata[key];
    if (Array.isArray(value) && value.every((item) => typeof item === "number")) return value;
    throw this.invalid(key, value, "an array of numbers");
  }

  invalid(key: string, value: unknown, expected: string): ClusterError {
    const shown = value === undefined ? "is missing" : `is ${String(value).slice(0, 60)}`;
    return new ClusterError("MODEL_FILE_INVALID", `${this.#path}: field "${key}" ${shown}; it must be ${expected}`);
  }

  unsupported(key: string, value: unknown, supported: string): ClusterError {
    return new ClusterError(
      "MODEL_UNSUPPORTED",
      `${this.#path}: field "${key}" is ${String(value)}; supported: ${supported}`,
    );
  }
}

/** @throws ClusterError MODEL_UNSUPPORTED for other architectures, MODEL_FILE_INVALID for missing or odd fields. */
export function ggufConfig(fields: GgufFields, file: GgufFile): ModelConfig {
  const architecture = fields.text("general.architecture");
  if (architecture !== "llama") throw fields.unsupported("general.architecture", architecture, "llama");
  const shards = fields.number("split.count", 1);
  if (shards > 1) throw fields.unsupported("split.count", shards, "1 (join the parts with llama-gguf-split --merge)");
  const experts = fields.number("llama.expert_count", 0);
  if (experts > 0) throw fields.unsupported("llama.expert_count", experts, "0 (no mixture of experts)");
  const hidden = fields.positive("llama.embedding_length");
  const heads = fields.positive("llama.attention.head_count");
  const headDim = fields.positive("llama.attention.key_length", hidden / heads);
  const valueDim = fields.positive("llama.attention.value_length", headDim);
  if (valueDim !== headDim)
    throw fields.unsupported("llama.attention.value_length", valueDim, `${headDim}, the key length`);
  const context = fields.positive("llama.context_length");
  const epsilonKey = "llama.attention.layer_norm_rms_epsilon";
  const embedding = file.tensors.get("token_embd.weight");
  return {
    architecture: "llama",
    layers: fields.positive("llama.block_count"),
    hidden,
    feedForward: fields.positive("llama.feed_forward_length"),
    heads,
    kvHeads: fields.positive("llama.attention.head_count_kv", heads),
    headDim,
    vocabulary: embedding?.rows ?? fields.positive("llama.vocab_size"),
    // Inside a sliding window attention is full attention: longer contexts would need the window itself.
    contextTokens: Math.min(context, fields.positive("llama.attention.sliding_window", context)),
    normEpsilon: fields.number(epsilonKey),
    rope: ropeConfig(fields, file, headDim),
    tiedEmbedding: !file.tensors.has("output.weight"),
  };
}

function ropeConfig(fields: GgufFields, file: GgufFile, headDim: number): RopeConfig {
  const scaling = ropeScaling(fields);
  const factors = file.tensors.get("rope_freqs.weight");
  if (factors !== undefined && factors.type !== "F32") {
    throw fields.unsupported("rope_freqs.weight", factors.type, "F32");
  }
  return {
    theta: fields.number("llama.rope.freq_base", 10_000),
    dimensions: fields.positive("llama.rope.dimension_count", headDim),
    layout: "interleaved",
    ...(scaling === undefined ? {} : { scaling }),
    ...(factors === undefined ? {} : { frequencyFactors: [...new Float32Array(factors.read().buffer)] }),
  };
}

function ropeScaling(fields: GgufFields): RopeScaling | undefined {
  const type = fields.text("llama.rope.scaling.type", "none");
  if (type === "none") return undefined;
  if (type !== "linear")
    throw fields.unsupported("llama.rope.scaling.type", type, "none, linear, or rope_freqs.weight");
  return { type: "linear", factor: fields.number("llama.rope.scaling.factor") };
}
