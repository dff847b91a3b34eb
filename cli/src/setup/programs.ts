/** Programs of the system that the tests call. */
import { spawnSync } from "node:child_process";
import { installPackages } from "./apt.ts";
import { step } from "./step.ts";

/** Program, how it tells its version, the Debian package that has it, and why. */
const TEST_PROGRAMS = [
  {
    program: "redis-server",
    version: "--version",
    debianPackage: "redis-server",
    purpose: "redis-server (for the tests)",
  },
  { program: "curl", version: "--version", debianPackage: "curl", purpose: "curl (an example of the README uses it)" },
  {
    program: "openssl",
    version: "version",
    debianPackage: "openssl",
    purpose: "openssl (the tests make TLS certificates with it)",
  },
  { program: "ps", version: "--version", debianPackage: "procps", purpose: "ps (for the tests)" },
];

/** Installs what lacks. @throws SetupError with the command to run where it may not. */
export async function ensureTestPrograms(): Promise<void> {
  for (const { program, version, debianPackage, purpose } of TEST_PROGRAMS) {
    if (spawnSync(program, [version], { stdio: "ignore" }).status === 0) continue;
    await step(`installing ${program}`, () => installPackages({ packages: [debianPackage], purpose }));
  }
}
