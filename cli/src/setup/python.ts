/** Python is needed for two things only: pip fetches the default model, and a test runs a Python gRPC client. */
import { execFile } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import { cacheFolder } from "../cache-folder.ts";
import { installPackages } from "./apt.ts";
import { SetupError } from "./setup-error.ts";
import { step } from "./step.ts";

const run = promisify(execFile);
const PYTHON = "python3";
/** What the Python client of the tests needs. */
const TEST_PACKAGES = ["grpcio-tools==1.76.0"];

async function succeeds(args: readonly string[]): Promise<boolean> {
  return run(PYTHON, args).then(
    () => true,
    () => false,
  );
}

/** Makes `python3 -m pip` work. @throws SetupError saying the command where it may not install it. */
export async function ensurePip(): Promise<string> {
  if (!(await succeeds(["-m", "pip", "--version"]))) {
    await step("installing pip", () => installPackages({ packages: ["python3-pip"], purpose: "Python's pip" }));
  }
  return PYTHON;
}

/** A virtual environment with grpcio-tools in the cache folder. @returns its python. */
export async function ensureTestPython(): Promise<string> {
  const folder = join(cacheFolder(), "test-python");
  const python = join(folder, "bin", "python");
  const stamp = join(folder, "installed");
  const wanted = TEST_PACKAGES.join(" ");
  if (existsSync(stamp) && readFileSync(stamp, "utf8") === wanted && existsSync(python)) return python;
  if (!(await succeeds(["-c", "import venv, ensurepip"]))) {
    const request = { packages: ["python3", "python3-venv"], purpose: "Python's venv" };
    await step("installing Python", () => installPackages(request));
  }
  await step("installing grpcio-tools for the tests", async () => {
    rmSync(folder, { recursive: true, force: true });
    mkdirSync(folder, { recursive: true });
    try {
      await run(PYTHON, ["-m", "venv", folder]);
      await run(python, ["-m", "pip", "install", "--quiet", "--only-binary=:all:", ...TEST_PACKAGES]);
    } catch (error) {
      const detail = (error as Error & { stderr?: string }).stderr?.trim().split("\n").at(-1) ?? String(error);
      throw new SetupError(
        `${detail}\nthe Python packages of the tests could not be installed. With a network connection, run:\n  ${PYTHON} -m venv ${folder} && ${python} -m pip install ${wanted}`,
      );
    }
    writeFileSync(stamp, wanted);
  });
  return python;
}
