/** Compiles TypeScript to dist/ where a source file changed since the last build. */
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { SetupError } from "./progress.mjs";

/** The command and all that it runs; tests and their helpers are type-checked by `npm run check`. */
const PACKAGES = ["proto", "kernels", "worker", "cachestore", "gateway", "cli"];
const STAMP = ".kivimesh/build-hash";

/** @param {string} root @returns {string} hash of every file that the build reads */
function sourceHash(root) {
  const hash = createHash("sha256");
  const files = [
    "tsconfig.base.json",
    "package-lock.json",
    ...PACKAGES.flatMap((name) => [
      `${name}/tsconfig.json`,
      `${name}/package.json`,
      ...readdirSync(join(root, name, "src"), { recursive: true, encoding: "utf8" })
        .filter((file) => file.endsWith(".ts"))
        .sort()
        .map((file) => `${name}/src/${file}`),
    ]),
  ];
  for (const file of files)
    hash
      .update(`${file}\0`)
      .update(readFileSync(join(root, file)))
      .update("\0");
  return hash.digest("hex");
}

/** A copy without sources (a container image) runs what it has. @param {string} root */
function hasSources(root) {
  return existsSync(join(root, "tsconfig.base.json")) && PACKAGES.every((name) => existsSync(join(root, name, "src")));
}

/** @param {string} root */
export function buildIsCurrent(root) {
  if (!hasSources(root)) return true;
  const stamp = join(root, STAMP);
  const built = PACKAGES.every((name) => existsSync(join(root, name, "dist/index.js")));
  return built && existsSync(stamp) && readFileSync(stamp, "utf8") === sourceHash(root);
}

/** @param {string} root */
export function build(root) {
  const hash = sourceHash(root);
  const compiler = join(root, "node_modules/typescript/bin/tsc");
  const { status } = spawnSync(process.execPath, [compiler, "-b", "cli"], { cwd: root, stdio: ["ignore", 2, 2] });
  if (status !== 0)
    throw new SetupError("the build failed (the compiler's messages are above); try again with: npm run build");
  mkdirSync(join(root, ".kivimesh"), { recursive: true });
  writeFileSync(join(root, STAMP), hash);
}
