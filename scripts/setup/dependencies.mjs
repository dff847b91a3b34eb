/** Installs the npm packages that package-lock.json names, where they are not there already. */
import { spawnSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { SetupError } from "./progress.mjs";

/** @param {string} path @returns {Record<string, {version?: string, integrity?: string, optional?: boolean, link?: boolean}>} */
function packagesOf(path) {
  return JSON.parse(readFileSync(path, "utf8")).packages ?? {};
}

/**
 * Whether node_modules holds what the lock file asks for. npm keeps a record of what it installed; packages for other
 * systems are optional and may lack.
 * @param {string} root
 */
export function dependenciesAreInstalled(root) {
  const record = join(root, "node_modules/.package-lock.json");
  if (!existsSync(record)) return false;
  const installed = packagesOf(record);
  return Object.entries(packagesOf(join(root, "package-lock.json"))).every(([path, wanted]) => {
    if (!path.startsWith("node_modules/") || wanted.optional === true) return true;
    const found = installed[path];
    return found !== undefined && found.version === wanted.version && found.integrity === wanted.integrity;
  });
}

/** @param {string} root */
export function installDependencies(root) {
  const npm = process.platform === "win32" ? "npm.cmd" : "npm";
  const { status, error } = spawnSync(npm, ["ci", "--no-fund", "--no-audit", "--loglevel=error"], {
    cwd: root,
    stdio: ["ignore", 2, 2],
    env: { ...process.env, npm_config_ignore_scripts: "true" },
  });
  if (status === 0) return;
  throw new SetupError(
    error === undefined
      ? "npm could not install the dependencies (its message is above). With a network connection to an npm registry, run: npm ci"
      : `npm does not run (${error.message}): install Node.js 20 or newer with npm, then run: npm ci`,
  );
}
