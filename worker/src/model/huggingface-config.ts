/** Model shape from a Hugging Face `config.json` (Llama and Mistral). */
import type { RopeScaling } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import { z } from "zod";
import type { ModelConfig } from "./model-config.ts";

const count = z.int().positive();

const scalingSchema = z.looseObject({
  rope_type: z.string().optional(),
  type: z.string().optional(),
  rope_theta: z.number().positive().optional(),
  factor: z.number().positive().optional(),
  low_freq_factor: z.number().positive().optional(),
  high_freq_factor: z.number().positive().optional(),
  original_max_position_embeddings: count.optional(),
});

const configSchema = z.looseObject({
  hidden_size: count,
  num_hidden_layers: count,
  num_attention_heads: count,
  num_key_value_heads: count.nullish(),
  head_dim: count.nullish(),
  intermediate_size: count,
  vocab_size: count,
  max_position_embeddings: count,
  rms_norm_eps: z.number().positive(),
  rope_theta: z.number().positive().nullish(),
  rope_scaling: scalingSchema.nullish(),
  // Newer files gather theta and scaling here.
  rope_parameters: scalingSchema.nullish(),
  tie_word_embeddings: z.boolean().nullish(),
  sliding_window: count.nullish(),
  hidden_act: z.literal(["silu", "swish"]).nullish(),
  attention_bias: z.literal(false).nullish(),
  mlp_bias: z.literal(false).nullish(),
});

const familySchema = z.looseObject({ model_type: z.string() });

/** Model types whose layers are Llama's. */
const FAMILIES = ["llama", "mistral"];

/**
 * @param path for messages. @param json parsed config.json.
 * @throws ClusterError MODEL_UNSUPPORTED for another model type or option, MODEL_FILE_INVALID for a missing or odd field.
 */
export function huggingFaceConfig(path: string, json: unknown): ModelConfig {
  const family = familySchema.safeParse(json);
  if (!family.success) throw new ClusterError("MODEL_FILE_INVALID", `${path}: field "model_type" is missing`);
  if (!FAMILIES.includes(family.data.model_type)) {
    throw new ClusterError(
      "MODEL_UNSUPPORTED",
      `${path}: field "model_type" is ${family.data.model_type}; supported: ${FAMILIES.join(", ")}`,
    );
  }
  const parsed = configSchema.safeParse(json);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    const field = issue?.path.join(".") ?? "";
    const code = issue?.code === "invalid_value" ? "MODEL_UNSUPPORTED" : "MODEL_FILE_INVALID";
    throw new ClusterError(code, `${path}: field "${field}": ${issue?.message}`, { cause: parsed.error });
  }
  const config = parsed.data;
  const heads = config.num_attention_heads;
  const headDim = config.head_dim ?? config.hidden_size / heads;
  const rope = config.rope_parameters ?? config.rope_scaling ?? undefined;
  const scaling = rope === undefined ? undefined : ropeScaling(path, rope, config.max_position_embeddings);
  return {
    architecture: "llama",
    layers: config.num_hidden_layers,
    hidden: config.hidden_size,
    feedForward: config.intermediate_size,
    heads,
    kvHeads: config.num_key_value_heads ?? heads,
    headDim,
    vocabulary: config.vocab_size,
    // Inside a sliding window attention is full attention: longer contexts would need the window itself.
    contextTokens: Math.min(config.max_position_embeddings, config.sliding_window ?? Number.POSITIVE_INFINITY),
    normEpsilon: config.rms_norm_eps,
    rope: {
      theta: config.rope_parameters?.rope_theta ?? config.rope_theta ?? 10_000,
      dimensions: headDim,
      layout: "half",
      ...(scaling === undefined ? {} : { scaling }),
    },
    tiedEmbedding: config.tie_word_embeddings ?? false,
  };
}

function ropeScaling(path: string, rope: z.infer<typeof scalingSchema>, context: number): RopeScaling | undefined {
  const type = rope.rope_type ?? rope.type ?? "default";
  if (type === "default") return undefined;
  const need = (field: "factor" | "low_freq_factor" | "high_freq_factor"): number => {
    const value = rope[field];
    if (value === undefined) {
      throw new ClusterError("MODEL_FILE_INVALID", `${path}: field "rope_scaling.${field}" is missing`);
    }
    return value;
  };
  if (type === "linear") return { type: "linear", factor: need("factor") };
  if (type !== "llama3") {
    throw new ClusterError(
      "MODEL_UNSUPPORTED",
      `${path}: field "rope_scaling.rope_type" is ${type}; supported: default, linear, llama3`,
    );
  }
  return {
    type: "llama3",
    factor: need("factor"),
    lowFrequencyFactor: need("low_freq_factor"),
    highFrequencyFactor: need("high_freq_factor"),
    originalContext: rope.original_max_position_embeddings ?? context,
  };
}
