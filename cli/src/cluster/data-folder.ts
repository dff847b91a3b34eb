/** The embedded cachestore's folder: one cluster at a time may use it. */
import { mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

export interface DataFolder {
  readonly path: string;
  /** Process that uses the wanted folder, where this one had to be made instead. */
  readonly usedBy: number | undefined;
  release(): void;
}

const OWNER_FILE = "kivimesh.pid";
/** A claim that is just being written is empty for a moment. */
const EMPTY_CLAIM_MS = 500;
const POLL_MS = 10;
/** Folders of this process: after a restart in a container, a claim left behind may bear this very process id. */
const claimed = new Set<string>();

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

/** The live process that has the claim; "unwritten" for an empty one. */
function ownerOf(file: string): number | "unwritten" | undefined {
  try {
    const text = readFileSync(file, "utf8");
    if (text === "") return "unwritten";
    const pid = Number(text);
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

/** Creates the claim, where there is none: of several processes that try, one succeeds. */
function createClaim(file: string): boolean {
  try {
    writeFileSync(file, String(process.pid), { flag: "wx" });
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EEXIST") return false;
    throw error;
  }
}

/** Takes a claim of a dead process away. Of several processes that try, one moves it. */
function removeStaleClaim(file: string): void {
  const aside = `${file}.${process.pid}`;
  try {
    renameSync(file, aside);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return;
    throw error;
  }
  // Between the look and the move, another process may have put its own claim there: that one goes back.
  const owner = ownerOf(aside);
  if (typeof owner === "number" && owner !== process.pid) renameSync(aside, file);
  else rmSync(aside, { force: true });
}

/** Claims the folder; while another live cluster has it, a temporary one instead. */
export async function claimFolder(path: string): Promise<DataFolder> {
  await mkdir(path, { recursive: true });
  const file = join(path, OWNER_FILE);
  const emptyUntil = Date.now() + EMPTY_CLAIM_MS;
  while (!createClaim(file)) {
    if (claimed.has(file)) return temporaryFolder(process.pid);
    const owner = ownerOf(file);
    if (owner === "unwritten" && Date.now() < emptyUntil) await sleep(POLL_MS);
    else if (typeof owner === "number" && owner !== process.pid) return temporaryFolder(owner);
    else removeStaleClaim(file);
  }
  claimed.add(file);
  const release = () => {
    claimed.delete(file);
    rmSync(file, { force: true });
  };
  return { path, usedBy: undefined, release };
}
