import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { claimFolder } from "./data-folder.ts";

describe("the embedded cachestore's folder", () => {
  it("belongs to one live process; another gets a folder that ends with it", async () => {
    const wanted = join(mkdtempSync(join(tmpdir(), "kivimesh-data-")), "cachestore");
    const other = spawn(process.execPath, ["-e", "setTimeout(() => {}, 60_000)"]);
    try {
      const mine = await claimFolder(wanted);
      expect(mine).toMatchObject({ path: wanted, usedBy: undefined });
      mine.release();
      writeFileSync(join(wanted, "kivimesh.pid"), String(other.pid));
      const spare = await claimFolder(wanted);
      expect(spare.usedBy).toBe(other.pid);
      expect(spare.path).not.toBe(wanted);
      expect(existsSync(spare.path)).toBe(true);
      spare.release();
      expect(existsSync(spare.path)).toBe(false);
    } finally {
      const gone = new Promise((resolve) => other.once("exit", resolve));
      other.kill("SIGKILL");
      await gone;
    }
    expect((await claimFolder(wanted)).path).toBe(wanted);
  });

  it("is given to one of many that ask at once, also after a dead owner", async () => {
    const wanted = join(mkdtempSync(join(tmpdir(), "kivimesh-data-")), "cachestore");
    mkdirSync(wanted);
    const dead = spawnSync(process.execPath, ["-e", ""]).pid;
    for (const left of [undefined, String(dead), "", String(process.pid)]) {
      if (left !== undefined) writeFileSync(join(wanted, "kivimesh.pid"), left);
      const folders = await Promise.all(Array.from({ length: 8 }, () => claimFolder(wanted)));
      expect(folders.filter((folder) => folder.path === wanted)).toHaveLength(1);
      expect(readFileSync(join(wanted, "kivimesh.pid"), "utf8")).toBe(String(process.pid));
      for (const folder of folders) folder.release();
    }
  });
});
