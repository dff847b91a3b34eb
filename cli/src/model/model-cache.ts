/**
 * Models on this machine: `<cache>/models/<name>/…`. A folder counts only with its manifest, which is written last, after
 * every file was verified; so what is listed is whole.
 */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { join, normalize, relative } from "node:path";
import { z } from "zod";
import { cacheFolder } from "../cache-folder.ts";

const MANIFEST = "kivimesh-model.json";

const manifestSchema = z.object({
  name: z.string(),
  source: z.string(),
  /** Commit or package version. */
  revision: z.string(),
  /** Branch, tag or commit that was asked for at a hub. */
  requested: z.string().optional(),
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

/**
 * The folder of a model: "hf:owner/name" becomes "hf--owner--name". Names that would share one with another get a part
 * of their hash behind it.
 */
export function modelFolder(name: string): string {
  const folder = name.replace(/^hf:/, "hf--").replaceAll("/", "--");
  const ambiguous = name.split("/").some((part) => /--|^-|-$/.test(part));
  const suffix = ambiguous ? `-${createHash("sha256").update(name).digest("hex").slice(0, 12)}` : "";
  return join(modelsFolder(), `${folder}${suffix}`);
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

/** The model of that name; undefined where it is not (wholly) here. */
export async function cachedModel(name: string): Promise<CachedModel | undefined> {
  const found = await cachedIn(modelFolder(name));
  return found?.manifest.name === name ? found : undefined;
}

/** Makes a model not count any more: its files are about to be replaced. Files that the next one shares are kept. */
export async function forgetModel(name: string): Promise<void> {
  await rm(join(modelFolder(name), MANIFEST), { force: true });
}

/** Removes what another revision left in the folder. Downloads that another process may be at are kept. */
async function removeOtherFiles(folder: string, manifest: ModelManifest): Promise<void> {
  const kept = new Set([MANIFEST, ...manifest.files.map((file) => normalize(file.path))]);
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    const path = join(entry.parentPath, entry.name);
    const known = kept.has(relative(folder, path)) || entry.name.endsWith(".partial");
    if (!entry.isDirectory() && !known) await rm(path, { force: true });
  }
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
  await removeOtherFiles(folder, manifest);
  const path = join(folder, MANIFEST);
  await writeFile(`${path}.partial`, `${JSON.stringify(manifest, undefined, 2)}\n`);
  await rename(`${path}.partial`, path);
}
