/** Turns on one GPU for several processes: whoever makes the folder has it. */
import { mkdirSync, rmdirSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

const RETRY_MILLISECONDS = 20;

async function take(path: string): Promise<void> {
  for (;;) {
    try {
      mkdirSync(path);
      return;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
      await sleep(RETRY_MILLISECONDS);
    }
  }
}

/** @returns a function that runs `work` while no other process does; at once where `path` is undefined. */
export function folderLock(path: string | undefined): <T>(work: () => Promise<T>) => Promise<T> {
  return async (work) => {
    if (path === undefined) return work();
    await take(path);
    // A process that ends in the middle must not hold up the others.
    const release = () => rmdirSync(path);
    process.once("exit", release);
    try {
      return await work();
    } finally {
      process.removeListener("exit", release);
      release();
    }
  };
}
