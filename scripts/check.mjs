/**
 * `npm run check`: types, lint and format, unused code, the .proto contract. Each check runs even when another fails.
 *
 * `-- --accept-contract` makes the present .proto files the contract that later changes must not break.
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { bootstrap, ROOT } from "./setup/bootstrap.mjs";
import { fail } from "./setup/progress.mjs";

const GENERATED = "proto/src/gen";
/** The published contract, as buf's image of the .proto files. */
const CONTRACT = "proto/contract.binpb";

/** @param {string} command @param {string[]} args */
function run(command, args) {
  const path = [join(ROOT, "node_modules/.bin"), process.env.PATH].join(":");
  return (
    spawnSync(command, args, {
      cwd: ROOT,
      stdio: ["ignore", "inherit", "inherit"],
      env: { ...process.env, PATH: path },
    }).status === 0
  );
}

/** @param {string} folder @returns {Map<string, string>} */
function contents(folder) {
  const files = readdirSync(folder, { recursive: true, encoding: "utf8" }).filter((file) => file.endsWith(".ts"));
  return new Map(files.sort().map((file) => [file, readFileSync(join(folder, file), "utf8")]));
}

function generatedCodeIsCurrent() {
  const folder = mkdtempSync(join(tmpdir(), "kivimesh-generated-"));
  try {
    if (!run("buf", ["generate", "proto", "-o", folder])) return false;
    const [fresh, tracked] = [contents(join(folder, GENERATED)), contents(join(ROOT, GENERATED))];
    const differing = [...new Set([...fresh.keys(), ...tracked.keys()])].filter(
      (file) => fresh.get(file) !== tracked.get(file),
    );
    for (const file of differing)
      process.stderr.write(`${GENERATED}/${file} does not match its .proto file; run: npm run generate\n`);
    return differing.length === 0;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function contractHolds() {
  if (existsSync(join(ROOT, CONTRACT))) return run("buf", ["breaking", "proto", "--against", CONTRACT]);
  process.stderr.write(`${CONTRACT} is missing; run: npm run check -- --accept-contract\n`);
  return false;
}

/** @type {readonly (readonly [string, () => boolean])[]} */
const CHECKS = [
  ["types (tsc)", () => run("tsc", ["-b"])],
  ["lint and format (biome)", () => run("biome", ["check", "--error-on-warnings", "."])],
  ["unused code (knip)", () => run("knip", [])],
  ["contract: lint (buf)", () => run("buf", ["lint"])],
  ["contract: nothing broken (buf)", contractHolds],
  ["contract: generated code is current", generatedCodeIsCurrent],
];

try {
  await bootstrap();
  if (process.argv.includes("--accept-contract")) {
    process.exit(run("buf", ["build", "proto", "--exclude-source-info", "-o", CONTRACT]) ? 0 : 1);
  }
  const failed = CHECKS.filter(([title, check]) => {
    const started = Date.now();
    const passed = check();
    process.stdout.write(`${passed ? "ok  " : "FAIL"} ${title} (${((Date.now() - started) / 1000).toFixed(1)} s)\n`);
    return !passed;
  });
  if (failed.length > 0)
    fail(Object.assign(new Error(`${failed.length} of ${CHECKS.length} checks failed`), { name: "SetupError" }));
} catch (error) {
  fail(error);
}
