/**
 * Models on this machine: `<cache>/models/<name>/…`. A folder counts only with its manifest, which is written last, after
 * every file was verified; so what is listed is whole.
 */
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, rename, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { cacheFolder } from "../cache-folder.ts";

const MANIFEST = "kivimesh-model.json";

const manifestSchema = z.object({
  name: z.string(),
  source: z.string(),
  /** Commit or package version. */
  revision: z.string(),
  /** What to load, inside the folder: a .gguf file, or "." for the whole folder. */
  entry: z.string(),
  files: z.array(z.object({ path: z.string(), bytes: z.number(), digest: z.string() })),
});

/** What was pulled. `digest` is "sha256:…" or, for small files of a hub, "git:…" (their git blob id). */
export type ModelManifest = z.infer<typeof manifestSchema>;

export interface CachedModel {
  readonly manifest: ModelManifest;
  /** Absolute path of the file or folder to load. */
  readonly path: string;
  readonly bytes: number;
}

export function modelsFolder(): string {
  return join(cacheFolder(), "models");
}

/** The folder of a model: "hf:owner/name" becomes "hf--owner--name". */
export function modelFolder(name: string): string {
  return join(modelsFolder(), name.replace(/^hf:/, "hf--").replaceAll("/", "--"));
}

async function readManifest(folder: string): Promise<ModelManifest | undefined> {
  const path = join(folder, MANIFEST);
  if (!existsSync(path)) return undefined;
  const parsed = manifestSchema.safeParse(JSON.parse(await readFile(path, "utf8")));
  return parsed.success ? parsed.data : undefined;
}

async function filesAreThere(folder: string, manifest: ModelManifest): Promise<boolean> {
  for (const file of manifest.files) {
    const found = await stat(join(folder, file.path)).catch(() => undefined);
    if (found?.size !== file.bytes) return false;
  }
  return true;
}

/** The model of that folder; undefined where it is not (wholly) there. */
async function cachedIn(folder: string): Promise<CachedModel | undefined> {
  const manifest = await readManifest(folder);
  if (manifest === undefined || !(await filesAreThere(folder, manifest))) return undefined;
  const bytes = manifest.files.reduce((sum, file) => sum + file.bytes, 0);
  return { manifest, path: join(folder, manifest.entry), bytes };
}

export function cachedModel(name: string): Promise<CachedModel | undefined> {
  return cachedIn(modelFolder(name));
}

export async function cachedModels(): Promise<CachedModel[]> {
  const folder = modelsFolder();
  if (!existsSync(folder)) return [];
  const found = await Promise.all((await readdir(folder)).sort().map((name) => cachedIn(join(folder, name))));
  return found.filter((model) => model !== undefined);
}

/** Makes a pulled model count. */
export async function recordModel(manifest: ModelManifest): Promise<void> {
  const folder = modelFolder(manifest.name);
  await mkdir(folder, { recursive: true });
  const path = join(folder, MANIFEST);
  await writeFile(`${path}.partial`, `${JSON.stringify(manifest, undefined, 2)}\n`);
  await rename(`${path}.partial`, path);
}
