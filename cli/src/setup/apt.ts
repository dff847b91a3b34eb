/** Installs Debian packages, or says the command where this user may not. */
import { spawn } from "node:child_process";
import { existsSync, writeFileSync } from "node:fs";
import { aptSources, hasSuite, mirrorOf, suiteStanza } from "./apt-sources.ts";
import { linuxRelease, usesApt } from "./linux-release.ts";
import { SetupError } from "./setup-error.ts";

export interface PackageRequest {
  readonly packages: readonly string[];
  /** What they are for, as "a Vulkan driver". */
  readonly purpose: string;
  /** Suite to take them from, such as "bookworm-backports"; added to apt's sources where it lacks. */
  readonly suite?: string;
}

const SOURCES_FILE = "/etc/apt/sources.list.d/kivimesh-backports.sources";
const KEPT_OUTPUT_CHARACTERS = 4000;
const LOCK_WAIT_SECONDS = 300;

function aptGet(args: readonly string[]): Promise<{ status: number; output: string }> {
  return new Promise((resolve, reject) => {
    const options = ["-q", "-o", `DPkg::Lock::Timeout=${LOCK_WAIT_SECONDS}`];
    const child = spawn("apt-get", [...options, ...args], {
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, DEBIAN_FRONTEND: "noninteractive", LC_ALL: "C" },
    });
    let output = "";
    const keep = (chunk: Buffer) => {
      output = (output + chunk.toString()).slice(-KEPT_OUTPUT_CHARACTERS);
    };
    child.stdout.on("data", keep);
    child.stderr.on("data", keep);
    child.once("error", reject);
    child.once("close", (code) => resolve({ status: code ?? 1, output }));
  });
}

/** The stanza that apt lacks for the request's suite; undefined where nothing lacks. */
function missingStanza(request: PackageRequest): string | undefined {
  const sources = aptSources();
  if (request.suite === undefined || hasSuite(sources, request.suite)) return undefined;
  const codename = linuxRelease()?.codename ?? "";
  const mirror = mirrorOf(sources, codename);
  if (mirror === undefined) {
    throw new SetupError(
      `${request.purpose} needs ${request.packages.join(", ")} from ${request.suite}, and apt's sources name no archive of ${codename}: add that suite to /etc/apt/sources.list.d and run this again`,
    );
  }
  return suiteStanza(mirror, request.suite);
}

function installArguments(request: PackageRequest): string[] {
  const suite = request.suite === undefined ? [] : ["-t", request.suite];
  return ["install", "-y", "--no-install-recommends", ...suite, ...request.packages];
}

/** The commands that root would run, one a line. */
export function manualCommands(request: PackageRequest, stanza: string | undefined): string {
  const quoted = stanza?.trimEnd().replaceAll("\n", "\\n");
  return [
    ...(quoted === undefined ? [] : [`printf '${quoted}\\n' | sudo tee ${SOURCES_FILE}`]),
    "sudo apt-get update",
    `sudo apt-get ${installArguments(request).join(" ")}`,
  ]
    .map((line) => `  ${line}`)
    .join("\n");
}

/**
 * Installs the packages with apt-get.
 * @throws SetupError with what to run by hand: not Debian or Ubuntu, not root, or apt-get failed.
 */
export async function installPackages(request: PackageRequest): Promise<void> {
  if (!usesApt(linuxRelease()) || !existsSync("/usr/bin/apt-get")) {
    throw new SetupError(
      `${request.purpose} is missing: install it with your system's package manager (on Debian it is in ${request.packages.join(", ")})`,
    );
  }
  const stanza = missingStanza(request);
  const commands = manualCommands(request, stanza);
  if (process.getuid?.() !== 0) {
    throw new SetupError(
      `${request.purpose} is missing, and installing it needs root. Run, then start again:\n${commands}`,
    );
  }
  if (stanza !== undefined) writeFileSync(SOURCES_FILE, stanza);
  for (const args of [["update"], installArguments(request)]) {
    const { status, output } = await aptGet(args);
    // A failed update is not the end: one archive of many may be down, and the lists may be new enough.
    if (status === 0 || args[0] === "update") continue;
    throw new SetupError(
      `${output.trimEnd()}\napt-get could not install ${request.purpose}. With a network connection, run, then start again:\n${commands}`,
    );
  }
}
