/** What `npm start` and `npm test` need beside packages and build. Each part is a no-op where it is there. */
import { prepareDriverEnvironment } from "../driver-environment.ts";
import { DEFAULT_MODEL, knownModel } from "../model/known-models.ts";
import { parseHubReference } from "../model/model-source.ts";
import { pullModel } from "../model/pull.ts";
import { ensureTestPrograms } from "./programs.ts";
import { ensureTestPython } from "./python.ts";
import { step } from "./step.ts";
import { ensureVulkanDriver } from "./vulkan-driver.ts";

/** A GPU driver and the model that the options of `kivimesh up` name. */
export async function setUpForServing(options: readonly string[]): Promise<void> {
  if (options.includes("--help") || options.includes("-h")) return;
  prepareDriverEnvironment();
  await ensureVulkanDriver();
  if (options.some((option) => option.startsWith("--load-format"))) return;
  const index = options.indexOf("--model");
  const inline = options.find((option) => option.startsWith("--model="))?.slice("--model=".length);
  const model = inline ?? (index >= 0 ? options[index + 1] : undefined) ?? process.env.KIVIMESH_MODEL ?? DEFAULT_MODEL;
  if (knownModel(model) === undefined && parseHubReference(model) === undefined) return;
  await step(`fetching model ${model}`, () => pullModel(model));
}

/** Everything of the test suite. @returns the environment that the tests run in. */
export async function setUpForTests(): Promise<NodeJS.ProcessEnv> {
  prepareDriverEnvironment();
  await ensureVulkanDriver();
  await ensureTestPrograms();
  const python = await ensureTestPython();
  const { model } = await step(`fetching model ${DEFAULT_MODEL}`, () => pullModel(DEFAULT_MODEL));
  return { ...process.env, KIVIMESH_TEST_PYTHON: python, KIVIMESH_TEST_MODEL_PATH: model.path };
}
