/** A model from a folder: config.json, tokenizer.json and one or several safetensors files. */
import { basename, join, resolve } from "node:path";
import { ClusterError } from "@kivimesh/proto";
import { z } from "zod";
import { huggingFaceConfig } from "./huggingface-config.ts";
import { huggingFaceTokenizer } from "./huggingface-tokenizer.ts";
import { readJson } from "./json-file.ts";
import { checkConfig, checkLlamaTensors } from "./llama-tensors.ts";
import type { LoadedModel, ModelTensor } from "./loaded-model.ts";
import { filesDigest } from "./model-digest.ts";
import { openSafetensors, type SafetensorsFile } from "./safetensors-file.ts";

const SINGLE = "model.safetensors";
const INDEX = "model.safetensors.index.json";

const indexSchema = z.looseObject({ weight_map: z.record(z.string(), z.string()) });

const NAMES: ReadonlyMap<string, string> = new Map([
  ["self_attn.q_proj.weight", "attn_q.weight"],
  ["self_attn.k_proj.weight", "attn_k.weight"],
  ["self_attn.v_proj.weight", "attn_v.weight"],
  ["self_attn.o_proj.weight", "attn_output.weight"],
  ["mlp.gate_proj.weight", "ffn_gate.weight"],
  ["mlp.up_proj.weight", "ffn_up.weight"],
  ["mlp.down_proj.weight", "ffn_down.weight"],
  ["input_layernorm.weight", "attn_norm.weight"],
  ["post_attention_layernorm.weight", "ffn_norm.weight"],
]);

/** The GGUF name of a Hugging Face tensor; unknown names stay, and are refused later by that name. */
function ggufName(name: string): string {
  if (name === "model.embed_tokens.weight") return "token_embd.weight";
  if (name === "model.norm.weight") return "output_norm.weight";
  if (name === "lm_head.weight") return "output.weight";
  const match = /^model\.layers\.(\d+)\.(.+)$/.exec(name);
  const known = match?.[2] === undefined ? undefined : NAMES.get(match[2]);
  return known === undefined ? name : `blk.${match?.[1]}.${known}`;
}

/** Shards in the index's order of names, each once; a lone model.safetensors needs no index. */
function shardPaths(folder: string, files: readonly string[]): { paths: string[]; owners?: Map<string, string> } {
  if (!files.includes(INDEX)) return { paths: [join(folder, SINGLE)] };
  const path = join(folder, INDEX);
  const index = indexSchema.safeParse(readJson(path));
  if (!index.success) {
    throw new ClusterError("MODEL_FILE_INVALID", `${path}: field "weight_map" is missing`, { cause: index.error });
  }
  const owners = new Map(Object.entries(index.data.weight_map));
  for (const [tensor, shard] of owners) {
    if (basename(shard) !== shard || !files.includes(shard)) {
      throw new ClusterError(
        "MODEL_FILE_INVALID",
        `${path}: tensor "${tensor}" is in "${shard}", which is not in the folder`,
      );
    }
  }
  return { paths: [...new Set(owners.values())].sort().map((shard) => join(folder, shard)), owners };
}

function gatherTensors(shards: readonly { path: string; file: SafetensorsFile }[], owners?: Map<string, string>) {
  const tensors = new Map<string, ModelTensor>();
  for (const { path, file } of shards) {
    for (const [name, tensor] of file.tensors) {
      // Older files carry the rotary frequencies, which follow from the configuration.
      if (!name.endsWith("rotary_emb.inv_freq")) tensors.set(ggufName(name), { ...tensor, name: ggufName(name) });
    }
    for (const [name, shard] of owners ?? []) {
      if (shard === basename(path) && !file.tensors.has(name)) {
        throw new ClusterError("MODEL_FILE_INVALID", `${path}: tensor "${name}" of the index is missing`);
      }
    }
  }
  return tensors;
}

/**
 * @param files names in the folder.
 * @throws ClusterError MODEL_FILE_INVALID or MODEL_UNSUPPORTED, naming the tensor or field.
 */
export async function loadHuggingFaceModel(
  folder: string,
  files: readonly string[],
  name?: string,
): Promise<LoadedModel> {
  const configPath = join(folder, "config.json");
  const config = huggingFaceConfig(configPath, readJson(configPath));
  checkConfig(configPath, config);
  const tokenizer = huggingFaceTokenizer(folder, files);
  const { paths, owners } = shardPaths(folder, files);
  const shards: { path: string; file: SafetensorsFile }[] = [];
  const close = () => {
    for (const { file } of shards) file.close();
  };
  try {
    for (const path of paths) shards.push({ path, file: openSafetensors(path) });
    const tensors = gatherTensors(shards, owners);
    // Some tied models store the head as well; the embedding is used for both.
    if (config.tiedEmbedding) tensors.delete("output.weight");
    checkLlamaTensors(folder, config, tensors);
    return {
      config,
      name: name ?? basename(resolve(folder)),
      digest: await filesDigest([configPath, ...paths]),
      tensors,
      tokenizer,
      fileBytes: shards.reduce((sum, { file }) => sum + file.fileBytes, 0),
      close,
    };
  } catch (error) {
    close();
    throw error;
  }
}
