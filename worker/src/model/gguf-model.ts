/** A model from one GGUF file. */
import { basename } from "node:path";
import { GgufFields, ggufConfig } from "./gguf-config.ts";
import { openGguf } from "./gguf-file.ts";
import { ggufTokenizer } from "./gguf-tokenizer.ts";
import { checkConfig, checkLlamaTensors } from "./llama-tensors.ts";
import type { LoadedModel } from "./loaded-model.ts";
import { fileDigest } from "./model-digest.ts";

/** @throws ClusterError MODEL_FILE_INVALID or MODEL_UNSUPPORTED, naming the tensor or field. */
export async function loadGgufModel(path: string, name?: string): Promise<LoadedModel> {
  const file = await openGguf(path);
  try {
    const fields = new GgufFields(path, file.metadata);
    const config = ggufConfig(fields, file);
    checkConfig(path, config);
    checkLlamaTensors(path, config, file.tensors);
    const tokenizer = ggufTokenizer(fields);
    return {
      config,
      name: name ?? basename(path).replace(/\.gguf$/i, ""),
      digest: await fileDigest(path),
      tensors: file.tensors,
      tokenizer,
      fileBytes: file.fileBytes,
      close: file.close,
    };
  } catch (error) {
    file.close();
    throw error;
  }
}
