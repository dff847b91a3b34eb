/** Opens a model by what its path is, or makes one up. */
import type { LoadedModel, ModelSource } from "./loaded-model.ts";

/**
 * Reads config, tokenizer and the tensor directory; tensors themselves are read when asked for.
 * @throws ClusterError MODEL_NOT_FOUND, MODEL_FILE_INVALID or MODEL_UNSUPPORTED, naming the tensor or field.
 */
export async function loadModel(source: ModelSource): Promise<LoadedModel> {
  throw new RangeError(`cannot load ${JSON.stringify(source)} yet`);
}
