import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, writeFileSync } from "node:fs";
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
});
