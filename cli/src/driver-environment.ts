/**
 * What Mesa's Vulkan drivers want from the environment. Without XDG_RUNTIME_DIR they warn at each start; without a
 * folder for compiled shaders that lasts, a software driver compiles every kernel anew (10 s and more).
 */
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { cacheFolder } from "./cache-folder.ts";

/** Sets the variables where the user has not; must run before the GPU is opened. Makes the folders. */
export function prepareDriverEnvironment(environment: NodeJS.ProcessEnv = process.env): void {
  const cache = cacheFolder(environment);
  const defaults = { XDG_RUNTIME_DIR: join(cache, "run"), MESA_SHADER_CACHE_DIR: join(cache, "shaders") };
  for (const [name, folder] of Object.entries(defaults)) {
    if (environment[name] !== undefined && environment[name] !== "") continue;
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    environment[name] = folder;
  }
}
