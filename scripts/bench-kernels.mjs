/**
 * `npm run bench:kernels`: builds the kernel bench as one file and runs it here. Arguments after `--` go to it
 * (kernels/bench/run-bench.ts lists them).
 *
 * `-- --bundle FILE` only builds: FILE runs on any machine that has Node and the npm package `webgpu`.
 */
import { execFileSync, spawnSync } from "node:child_process";
import { mkdirSync, rmSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { build } from "esbuild";

const ROOT = resolve(import.meta.dirname, "..");

/** The commit that is measured; marked where files differ from it. */
function commit() {
  const git = (/** @type {string[]} */ ...args) =>
    execFileSync("git", args, { cwd: ROOT, encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
  try {
    return `${git("rev-parse", "--short", "HEAD")}${git("status", "--porcelain", "--", "kernels/src") === "" ? "" : " with changes"}`;
  } catch {
    return "unknown";
  }
}

/** @param {string} outfile */
async function bundle(outfile) {
  mkdirSync(dirname(outfile), { recursive: true });
  await build({
    entryPoints: [join(ROOT, "kernels/bench/run-bench.ts")],
    outfile,
    bundle: true,
    platform: "node",
    format: "esm",
    target: "node20",
    external: ["webgpu"],
    define: { BENCH_COMMIT: JSON.stringify(commit()) },
    logLevel: "warning",
  });
}

const args = process.argv.slice(2);
const flag = args.indexOf("--bundle");
if (flag >= 0) {
  const file = args[flag + 1];
  if (file === undefined) throw new Error("--bundle needs the name of the file to write");
  await bundle(resolve(file));
} else {
  // Inside the package, so that `webgpu` is found.
  const file = join(ROOT, "kernels/dist/bench", `run-bench-${process.pid}.mjs`);
  await bundle(file);
  const { status } = spawnSync(process.execPath, [file, ...args], { stdio: "inherit" });
  rmSync(file, { force: true });
  process.exitCode = status ?? 1;
}
