/** Which tensors a Llama-family model consists of, and the check that a file has exactly these. */
import { ClusterError } from "@kivimesh/proto";
import type { ModelTensor } from "./loaded-model.ts";
import type { ModelConfig } from "./model-config.ts";

export interface TensorShape {
  readonly name: string;
  readonly rows: number;
  readonly columns: number;
}

/** Expected tensors in GGUF names: embedding, layers in order, final norm and, where not tied, the head. */
export function llamaTensors(config: ModelConfig): readonly TensorShape[] {
  const { hidden, feedForward, vocabulary } = config;
  const queries = config.heads * config.headDim;
  const keys = config.kvHeads * config.headDim;
  const shapes: TensorShape[] = [{ name: "token_embd.weight", rows: vocabulary, columns: hidden }];
  for (let layer = 0; layer < config.layers; layer++) {
    const add = (name: string, rows: number, columns: number) =>
      shapes.push({ name: `blk.${layer}.${name}.weight`, rows, columns });
    add("attn_norm", 1, hidden);
    add("attn_q", queries, hidden);
    add("attn_k", keys, hidden);
    add("attn_v", keys, hidden);
    add("attn_output", hidden, queries);
    add("ffn_norm", 1, hidden);
    add("ffn_gate", feedForward, hidden);
    add("ffn_up", feedForward, hidden);
    add("ffn_down", hidden, feedForward);
  }
  shapes.push({ name: "output_norm.weight", rows: 1, columns: hidden });
  if (!config.tiedEmbedding) shapes.push({ name: "output.weight", rows: vocabulary, columns: hidden });
  return shapes;
}

/** Tensors that are used elsewhere or carry nothing that the model needs. */
const KNOWN_EXTRAS = new Set(["rope_freqs.weight"]);

/**
 * @throws ClusterError MODEL_FILE_INVALID for a tensor that is missing or has another shape, MODEL_UNSUPPORTED for one
 *   that a Llama model does not have (a bias, an expert): ignoring it would give wrong answers.
 */
export function checkLlamaTensors(path: string, config: ModelConfig, tensors: ReadonlyMap<string, ModelTensor>): void {
  const expected = new Set<string>(KNOWN_EXTRAS);
  for (const { name, rows, columns } of llamaTensors(config)) {
    expected.add(name);
    const tensor = tensors.get(name);
    if (tensor === undefined) throw new ClusterError("MODEL_FILE_INVALID", `${path}: tensor "${name}" is missing`);
    if (tensor.rows !== rows || tensor.columns !== columns) {
      throw new ClusterError(
        "MODEL_FILE_INVALID",
        `${path}: tensor "${name}" is ${tensor.rows} x ${tensor.columns}; the configuration asks for ${rows} x ${columns}`,
      );
    }
  }
  for (const name of tensors.keys()) {
    if (expected.has(name)) continue;
    throw new ClusterError(
      "MODEL_UNSUPPORTED",
      `${path}: tensor "${name}" is not part of a Llama model without biases and experts, which is what can be run`,
    );
  }
}

/** @throws ClusterError MODEL_FILE_INVALID where the numbers contradict each other. */
export function checkConfig(path: string, config: ModelConfig): void {
  const fail = (message: string) => new ClusterError("MODEL_FILE_INVALID", `${path}: ${message}`);
  const { heads, kvHeads, headDim, rope, hidden, feedForward, vocabulary } = config;
  for (const [name, value] of Object.entries({ heads, kvHeads, headDim, hidden, feedForward, vocabulary })) {
    if (!Number.isInteger(value) || value <= 0) throw fail(`${name} is ${value}; it must be a positive integer`);
  }
  if (heads % kvHeads !== 0) throw fail(`${kvHeads} key/value heads do not divide ${heads} heads`);
  if (headDim % 2 !== 0) throw fail(`head dimension ${headDim} is odd`);
  if (rope.dimensions > headDim || rope.dimensions % 2 !== 0) {
    throw fail(`${rope.dimensions} rotary dimensions; must be even and at most the head's ${headDim}`);
  }
  const factors = rope.frequencyFactors;
  if (factors !== undefined && factors.length !== rope.dimensions / 2) {
    throw fail(`${factors.length} rotary frequency factors for ${rope.dimensions / 2} pairs`);
  }
}
