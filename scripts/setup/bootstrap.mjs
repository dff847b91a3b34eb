/** What must be there before any module of ours can run: Node.js, the npm packages and the build. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build, buildIsCurrent } from "./build.mjs";
import { dependenciesAreInstalled, installDependencies } from "./dependencies.mjs";
import { withLock } from "./lock.mjs";
import { SetupError, step } from "./progress.mjs";

/** The repository's root. */
export const ROOT = fileURLToPath(new URL("../..", import.meta.url));

const LOCK = join(ROOT, ".kivimesh/setup.lock");
const OLDEST_NODE = [20, 19];

function checkNode() {
  const [major = 0, minor = 0] = process.versions.node.split(".").map(Number);
  if (major > OLDEST_NODE[0] || (major === OLDEST_NODE[0] && minor >= OLDEST_NODE[1])) return;
  throw new SetupError(`Node.js ${process.versions.node} is too old: install ${OLDEST_NODE.join(".")} or newer`);
}

/**
 * Installs and builds what lacks.
 * @param {{ dependencies?: "current" | "present" }} [options] `present` accepts any installed packages: a command
 *   that runs inside a larger installation must not replace them.
 */
export async function bootstrap({ dependencies = "current" } = {}) {
  checkNode();
  const installed = () =>
    dependencies === "current" ? dependenciesAreInstalled(ROOT) : existsSync(join(ROOT, "node_modules"));
  if (installed() && buildIsCurrent(ROOT)) return;
  await withLock(LOCK, async () => {
    if (!installed()) await step("installing npm packages", async () => installDependencies(ROOT));
    if (!buildIsCurrent(ROOT)) await step("building", async () => build(ROOT));
  });
}
