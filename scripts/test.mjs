/**
 * `npm test`: sets up what lacks, then runs every test. Arguments after `--` go to vitest (`npm test -- kernels`).
 * Its last line is `N passed, N failed`.
 */
import { spawn } from "node:child_process";
import { writeSync } from "node:fs";
import { join } from "node:path";
import { bootstrap, ROOT } from "./setup/bootstrap.mjs";
import { fail } from "./setup/progress.mjs";

try {
  await bootstrap();
  const { setUpForTests } = await import("../cli/dist/setup/set-up.js");
  const env = await setUpForTests();
  const vitest = join(ROOT, "node_modules/vitest/vitest.mjs");
  const child = spawn(process.execPath, [vitest, "run", ...process.argv.slice(2)], {
    cwd: ROOT,
    env,
    stdio: "inherit",
  });
  // Ctrl-C reaches the whole process group: vitest ends first and tells how it went.
  for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => child.kill(signal));
  process.exitCode = await new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("close", (code) => resolve(code ?? 1));
  });
} catch (error) {
  process.once("exit", () => writeSync(1, "0 passed, 1 failed\n"));
  fail(error);
}
