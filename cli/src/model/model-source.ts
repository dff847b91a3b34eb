/** What `--model` may be: a known name, `hf:owner/repo[/file.gguf]`, or a path. */
import { existsSync } from "node:fs";
import { basename, resolve } from "node:path";
import { ClusterError } from "@kivimesh/proto";
import { KNOWN_MODELS, knownModel } from "./known-models.ts";
import { cachedModel } from "./model-cache.ts";

export interface HubReference {
  readonly repository: string;
  /** File inside the repository; undefined: chosen from what is there. */
  readonly file: string | undefined;
}

const HUB_PREFIX = "hf:";

/** @throws ClusterError INVALID_ARGUMENT where it starts with "hf:" and is malformed; undefined for other texts. */
export function parseHubReference(text: string): HubReference | undefined {
  if (!text.startsWith(HUB_PREFIX)) return undefined;
  const [owner, repository, ...rest] = text.slice(HUB_PREFIX.length).split("/");
  const names = [owner, repository, ...rest];
  if (
    owner === undefined ||
    repository === undefined ||
    names.some((name) => !/^[\w.-]+$/.test(name ?? "") || name === "..")
  ) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `"${text}" is not of the form hf:owner/repository or hf:owner/repository/file.gguf`,
    );
  }
  return { repository: `${owner}/${repository}`, file: rest.length === 0 ? undefined : rest.join("/") };
}

export interface LocalModel {
  /** Absolute path of a .gguf file or of a folder of safetensors. */
  readonly path: string;
  /** Name under which it is served. */
  readonly name: string;
}

/**
 * Finds the model on this machine.
 * @throws ClusterError MODEL_NOT_FOUND with the command that would fetch it, or with what is allowed.
 */
export async function resolveModel(text: string): Promise<LocalModel> {
  const fetchable = knownModel(text) !== undefined || parseHubReference(text) !== undefined;
  if (fetchable) {
    const cached = await cachedModel(text);
    if (cached !== undefined) return { path: cached.path, name: text };
    throw new ClusterError(
      "MODEL_NOT_FOUND",
      `model ${text} is not on this machine yet; run: npx kivimesh pull ${text}`,
    );
  }
  if (existsSync(text)) {
    const path = resolve(text);
    return { path, name: basename(path).replace(/\.gguf$/i, "") };
  }
  const names = KNOWN_MODELS.map((model) => model.name).join(", ");
  throw new ClusterError(
    "MODEL_NOT_FOUND",
    `no model "${text}": expected a path, hf:owner/repository[/file.gguf], or one of ${names}`,
  );
}
