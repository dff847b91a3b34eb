/** Fetches models from a Hugging Face hub: `HF_ENDPOINT` says which, `HF_TOKEN` opens gated and private repositories. */
import { join } from "node:path";
import { HubApiError, type ListFileEntry, listFiles, modelInfo } from "@huggingface/hub";
import { ClusterError } from "@kivimesh/proto";
import { byteProgress } from "../progress-bar.ts";
import { SetupError } from "../setup/setup-error.ts";
import { forgetModel, modelFolder, recordModel } from "./model-cache.ts";
import type { HubReference } from "./model-source.ts";
import { storageError } from "./storage-error.ts";
import { downloadVerified, type FileDigest } from "./verified-download.ts";

export interface HubOptions {
  /** Default: https://huggingface.co */
  readonly endpoint: string;
  readonly token: string | undefined;
  /** Branch, tag or commit. */
  readonly revision: string;
}

export const DEFAULT_REVISION = "main";

export function hubOptions(
  environment: NodeJS.ProcessEnv = process.env,
  revision: string = DEFAULT_REVISION,
): HubOptions {
  const endpoint = environment.HF_ENDPOINT?.replace(/\/+$/, "");
  return {
    endpoint: endpoint === undefined || endpoint === "" ? "https://huggingface.co" : endpoint,
    token: environment.HF_TOKEN === "" ? undefined : environment.HF_TOKEN,
    revision,
  };
}

/** What a folder of safetensors needs beside the weights. */
const COMPANION_FILES: ReadonlySet<string> = new Set([
  "config.json",
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "model.safetensors.index.json",
]);

const MAX_FILES = 10_000;

/** The library refuses tokens that do not start with "hf_" with a message of its own. */
function credentials(options: HubOptions): { accessToken?: string } {
  return options.token === undefined ? {} : { accessToken: options.token };
}

function hubError(error: unknown, reference: HubReference, options: HubOptions): Error {
  if (error instanceof SetupError) return error;
  if (!(error instanceof HubApiError)) {
    const cause = (error as Error & { cause?: Error }).cause?.message;
    const reason = `${(error as Error).message}${cause === undefined ? "" : `: ${cause}`}`;
    return error instanceof ClusterError
      ? error
      : new ClusterError("MODEL_NOT_FOUND", `${options.endpoint}: ${reason}`, { cause: error });
  }
  const hint = error.statusCode === 401 || error.statusCode === 403 ? "; set HF_TOKEN if it is private or gated" : "";
  return new ClusterError(
    "MODEL_NOT_FOUND",
    `${options.endpoint} answered ${error.statusCode} for ${reference.repository}${hint}`,
    { cause: error },
  );
}

/** A hub that lists such a path wants to write elsewhere than into the model's folder. */
function isInsideFolder(path: string): boolean {
  return !path.includes("\\") && path.split("/").every((part) => part !== "" && part !== "." && part !== "..");
}

/**
 * The files to fetch: the named one, or the only GGUF file, or a folder of safetensors.
 * @throws ClusterError INVALID_ARGUMENT or MODEL_NOT_FOUND naming what the repository holds; MODEL_FILE_INVALID where
 *   a path leads out of a folder.
 */
export function chooseFiles(files: readonly ListFileEntry[], reference: HubReference): ListFileEntry[] {
  const outside = files.find((file) => !isInsideFolder(file.path));
  if (outside !== undefined) {
    throw new ClusterError(
      "MODEL_FILE_INVALID",
      `${reference.repository} lists ${JSON.stringify(outside.path)}, which is no path inside a folder`,
    );
  }
  const ggufs = files.filter((file) => file.path.toLowerCase().endsWith(".gguf"));
  const choices = ggufs.map((file) => `hf:${reference.repository}/${file.path}`).join(", ");
  if (reference.file !== undefined) {
    const found = files.filter((file) => file.path === reference.file);
    if (found.length > 0) return found;
    throw new ClusterError(
      "MODEL_NOT_FOUND",
      `${reference.repository} has no file ${reference.file}${choices === "" ? "" : `; it has ${choices}`}`,
    );
  }
  const weights = files.filter((file) => file.path.endsWith(".safetensors") && !file.path.includes("/"));
  if (weights.length > 0) return [...files.filter((file) => COMPANION_FILES.has(file.path)), ...weights];
  if (ggufs.length === 1) return ggufs;
  if (ggufs.length === 0) {
    throw new ClusterError("MODEL_NOT_FOUND", `${reference.repository} holds neither safetensors nor a GGUF file`);
  }
  throw new ClusterError(
    "INVALID_ARGUMENT",
    `${reference.repository} holds ${ggufs.length} GGUF files; name one: ${choices}`,
  );
}

function digestOf(file: ListFileEntry): FileDigest {
  if (file.lfs !== undefined) return { algorithm: "sha256", value: file.lfs.oid.replace(/^sha256:/, "") };
  if (file.oid !== undefined) return { algorithm: "git", value: file.oid };
  throw new ClusterError("MODEL_FILE_INVALID", `the hub names no digest of ${file.path}`);
}

async function describeRepository(
  reference: HubReference,
  options: HubOptions,
): Promise<{ commit: string; files: ListFileEntry[] }> {
  const common = { hubUrl: options.endpoint, ...credentials(options) };
  try {
    const info = await modelInfo({
      name: reference.repository,
      revision: options.revision,
      additionalFields: ["sha"],
      ...common,
    });
    const files: ListFileEntry[] = [];
    for await (const file of listFiles({
      repo: reference.repository,
      recursive: true,
      revision: info.sha,
      ...common,
    })) {
      if (file.type === "file") files.push(file);
      if (files.length > MAX_FILES)
        throw new ClusterError("INVALID_ARGUMENT", `${reference.repository} holds more than ${MAX_FILES} files`);
    }
    return { commit: info.sha, files };
  } catch (error) {
    throw hubError(error, reference, options);
  }
}

/** Fetches, verifies and caches `hf:owner/repo[/file]`. Files that are there already with the right digest are kept. */
export async function pullFromHub(
  name: string,
  reference: HubReference,
  options: HubOptions,
  signal?: AbortSignal,
): Promise<void> {
  const { commit, files } = await describeRepository(reference, options);
  const chosen = chooseFiles(files, reference);
  const folder = modelFolder(name);
  await forgetModel(name);
  const headers: Record<string, string> =
    options.token === undefined ? {} : { Authorization: `Bearer ${options.token}` };
  for (const file of chosen) {
    const path = file.path.split("/").map(encodeURIComponent).join("/");
    const progress = byteProgress(file.path, file.size);
    try {
      await downloadVerified({
        url: `${options.endpoint}/${reference.repository}/resolve/${commit}/${path}`,
        headers,
        bytes: file.size,
        digest: digestOf(file),
        target: join(folder, file.path),
        onProgress: (bytes) => progress.update(bytes),
        ...(signal === undefined ? {} : { signal }),
      });
    } catch (error) {
      throw storageError(error, join(folder, file.path)) ?? hubError(error, reference, options);
    } finally {
      progress.stop();
    }
  }
  const only = chosen.length === 1 ? chosen[0]?.path : undefined;
  await recordModel({
    name,
    requested: options.revision,
    source: `${options.endpoint}/${reference.repository}`,
    revision: commit,
    entry: only?.toLowerCase().endsWith(".gguf") === true ? only : ".",
    files: chosen.map((file) => ({
      path: file.path,
      bytes: file.size,
      digest: `${digestOf(file).algorithm}:${digestOf(file).value}`,
    })),
  });
}
