/** Puts a loaded model on the GPU. */
import type { ModelRunner, OpenModelRunnerOptions } from "./model-runner.ts";

/**
 * Uploads the weights and compiles everything a step needs.
 * @throws ClusterError GPU_UNAVAILABLE, MODEL_UNSUPPORTED, INVALID_ARGUMENT.
 */
export async function openModelRunner(options: OpenModelRunnerOptions): Promise<ModelRunner> {
  throw new RangeError(`cannot run ${options.model.name} yet`);
}
