/** What `npm start` and `npm test` need beside packages and build. Each part is a no-op where it is there. */
import { prepareDriverEnvironment } from "../driver-environment.ts";
import { DEFAULT_MODEL, knownModel } from "../model/known-models.ts";
import { cachedModel } from "../model/model-cache.ts";
import { ensureTestPrograms } from "./programs.ts";
import { ensureTestPython } from "./python.ts";
import { step } from "./step.ts";
import { ensureVulkanDriver } from "./vulkan-driver.ts";

/** @returns the model's path, fetched if it lacks. What fetches is loaded only then: a second start is to be quick. */
async function ensureModel(name: string): Promise<string> {
  const cached = await cachedModel(name);
  if (cached !== undefined) return cached.path;
  return step(`fetching model ${name}`, async () => {
    const { pullModel } = await import("../model/pull.ts");
    return (await pullModel(name)).model.path;
  });
}

/** A GPU driver and the model that the options of `kivimesh up` name. */
export async function setUpForServing(options: readonly string[]): Promise<void> {
  if (options.includes("--help") || options.includes("-h")) return;
  prepareDriverEnvironment();
  await ensureVulkanDriver();
  const dummy = process.env.KIVIMESH_LOAD_FORMAT === "dummy";
  if (dummy || options.some((option) => option.startsWith("--load-format"))) return;
  const index = Math.max(options.indexOf("--model"), options.indexOf("-m"));
  const inline = options.find((option) => option.startsWith("--model="))?.slice("--model=".length);
  const model = inline ?? (index >= 0 ? options[index + 1] : undefined) ?? process.env.KIVIMESH_MODEL ?? DEFAULT_MODEL;
  if (knownModel(model) !== undefined || model.startsWith("hf:")) await ensureModel(model);
}

/** Everything of the test suite. @returns the environment that the tests run in. */
export async function setUpForTests(): Promise<NodeJS.ProcessEnv> {
  prepareDriverEnvironment();
  await ensureVulkanDriver();
  await ensureTestPrograms();
  const python = await ensureTestPython();
  const model = await ensureModel(DEFAULT_MODEL);
  return { ...process.env, KIVIMESH_TEST_PYTHON: python, KIVIMESH_TEST_MODEL_PATH: model };
}
