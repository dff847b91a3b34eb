/** The embedded cachestore's folder: one cluster at a time may use it. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

export interface DataFolder {
  readonly path: string;
  /** Process that uses the wanted folder, where this one had to be made instead. */
  readonly usedBy: number | undefined;
  release(): void;
}

const OWNER_FILE = "kivimesh.pid";

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

function ownerOf(file: string): number | undefined {
  try {
    const pid = Number(readFileSync(file, "utf8"));
    return Number.isInteger(pid) && pid > 0 && isAlive(pid) ? pid : undefined;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** A folder that goes when it is released, or when the process exits. */
export function temporaryFolder(usedBy?: number): DataFolder {
  const path = mkdtempSync(join(tmpdir(), "kivimesh-"));
  const remove = () => rmSync(path, { recursive: true, force: true });
  process.once("exit", remove);
  return {
    path,
    usedBy,
    release() {
      process.off("exit", remove);
      remove();
    },
  };
}

/** Claims the folder; while another live process has it, a temporary one instead. */
export async function claimFolder(path: string): Promise<DataFolder> {
  await mkdir(path, { recursive: true });
  const file = join(path, OWNER_FILE);
  const owner = ownerOf(file);
  if (owner !== undefined && owner !== process.pid) return temporaryFolder(owner);
  writeFileSync(file, String(process.pid));
  return { path, usedBy: undefined, release: () => rmSync(file, { force: true }) };
}
