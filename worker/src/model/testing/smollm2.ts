/** Where tests find the real model. */
import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";

/** Path of SmolLM2-135M-Instruct (Q4_1). @throws Error with the command that fetches it. */
export function smollm2Path(): string {
  const cache = process.env.KIVIMESH_CACHE ?? join(homedir(), ".cache", "kivimesh");
  const path =
    process.env.KIVIMESH_TEST_MODEL ??
    join(cache, "models", "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf");
  if (existsSync(path)) return path;
  throw new Error(`${path} is missing; fetch it: npx kivimesh pull smollm2-135m-instruct`);
}
