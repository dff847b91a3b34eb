/** Where kivimesh keeps models, compiled shaders and blocks between runs. */
import { homedir } from "node:os";
import { join, resolve } from "node:path";

/** KIVIMESH_CACHE, else ~/.cache/kivimesh; absolute. */
export function cacheFolder(environment: NodeJS.ProcessEnv = process.env): string {
  const chosen = environment.KIVIMESH_CACHE;
  return chosen === undefined || chosen === "" ? join(homedir(), ".cache", "kivimesh") : resolve(chosen);
}
