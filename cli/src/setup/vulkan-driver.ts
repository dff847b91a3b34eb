/** Makes sure that some GPU driver works: a real one where there is one, else Mesa's software driver (lavapipe). */
import { execFile } from "node:child_process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { installPackages, type PackageRequest } from "./apt.ts";
import { type LinuxRelease, linuxRelease } from "./linux-release.ts";
import { SetupError } from "./setup-error.ts";
import { step } from "./step.ts";

export interface ProbedGpu {
  readonly name: string;
  readonly profile: "software" | "hardware";
}

/** Older lavapipe lacks what Dawn asks of a Vulkan driver, or is wrong in ways that our tests see. */
const OLDEST_LAVAPIPE_MAJOR = 24;
const PROBE_TIMEOUT_MS = 60_000;
const PROBE = fileURLToPath(new URL("../../dist/setup/gpu-probe.js", import.meta.url));
const PACKAGES = ["libvulkan1", "mesa-vulkan-drivers"];

/** @returns what opened, or why nothing did. */
export async function probeGpu(): Promise<ProbedGpu | string> {
  try {
    const { stdout } = await promisify(execFile)(process.execPath, [PROBE], { timeout: PROBE_TIMEOUT_MS });
    return JSON.parse(stdout.trim().split("\n").at(-1) ?? "") as ProbedGpu;
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: string };
    const lines = (stderr ?? "").split("\n").filter((line) => /error/i.test(line));
    return lines.at(0)?.trim() ?? message.split("\n")[0] ?? "unknown reason";
  }
}

/** Whether this is lavapipe of a Mesa that is too old; its name says "llvmpipe: Mesa 22.3.6 (LLVM …)". */
export function isOldLavapipe(gpu: ProbedGpu): boolean {
  const major = /llvmpipe.*\bMesa (\d+)\./i.exec(gpu.name)?.[1];
  return major !== undefined && Number(major) < OLDEST_LAVAPIPE_MAJOR;
}

/** What to install on this release. Debian 12 ships Mesa 22.3; its backports have a newer one. */
export function driverPackages(release: LinuxRelease | undefined): PackageRequest {
  const request = { packages: PACKAGES, purpose: "a Vulkan driver" };
  return release?.id === "debian" && release.codename === "bookworm"
    ? { ...request, suite: "bookworm-backports" }
    : request;
}

/**
 * Probes, installs lavapipe where nothing usable answers, probes again.
 * @throws SetupError with the commands to run where this user may not install.
 */
export async function ensureVulkanDriver(): Promise<ProbedGpu> {
  const found = await step("opening the GPU", probeGpu);
  if (typeof found !== "string" && !isOldLavapipe(found)) return found;
  if (process.platform !== "linux") throw new SetupError(`no GPU that WebGPU can use: ${String(found)}`);
  await step("installing the software GPU driver (lavapipe)", () => installPackages(driverPackages(linuxRelease())));
  const installed = await step("opening the GPU", probeGpu);
  if (typeof installed === "string") {
    throw new SetupError(
      `a Vulkan driver is installed, but no GPU opens: ${installed} (vulkaninfo of vulkan-tools shows more)`,
    );
  }
  if (isOldLavapipe(installed)) {
    throw new SetupError(`${installed.name} is too old: Mesa ${OLDEST_LAVAPIPE_MAJOR} or newer is needed`);
  }
  return installed;
}
