/** Opens a model by what its path is, or makes one up. */
import { readdir, stat } from "node:fs/promises";
import { ClusterError } from "@kivimesh/proto";
import { dummyModel } from "./dummy-model.ts";
import { loadGgufModel } from "./gguf-model.ts";
import { loadHuggingFaceModel } from "./huggingface-model.ts";
import type { LoadedModel, ModelSource } from "./loaded-model.ts";

/**
 * Reads config, tokenizer and the tensor directory; tensors themselves are read when asked for.
 * @throws ClusterError MODEL_NOT_FOUND, MODEL_FILE_INVALID or MODEL_UNSUPPORTED, naming the tensor or field.
 */
export async function loadModel(source: ModelSource): Promise<LoadedModel> {
  if ("dummy" in source) return dummyModel(source.dummy, source.seed);
  const { path, name } = source;
  const files = await filesOf(path);
  if (files === undefined) return loadGgufModel(path, name);
  if (files.includes("config.json")) return loadHuggingFaceModel(path, files, name);
  const [gguf, ...others] = files.filter((file) => file.endsWith(".gguf"));
  if (gguf !== undefined && others.length === 0) return loadGgufModel(`${path}/${gguf}`, name);
  throw new ClusterError(
    "MODEL_FILE_INVALID",
    `${path}: a model folder holds config.json, tokenizer.json and safetensors files, or exactly one .gguf file`,
  );
}

/** Names in a folder; undefined for a file. */
async function filesOf(path: string): Promise<string[] | undefined> {
  try {
    return (await stat(path)).isDirectory() ? await readdir(path) : undefined;
  } catch (error) {
    throw new ClusterError("MODEL_NOT_FOUND", `${path}: there is no such file or folder`, { cause: error });
  }
}
