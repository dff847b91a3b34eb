/** The cluster in one process, as `kivimesh up` runs it. The engines' threads run the build in dist/. */
import { mkdtempSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, it } from "vitest";
import { main } from "../main.ts";
import type { Output } from "../output.ts";

const DUMMY = ["--load-format", "dummy", "--architecture", "tiny-llama", "--workers", "1"];

/** Runs `kivimesh up` in this process. */
async function up(...options: string[]): Promise<{ code: number; out: string; notices: string }> {
  let out = "";
  let notices = "";
  const output: Output = {
    write: (text) => {
      out += text;
    },
    line: (text = "") => {
      out += `${text}\n`;
    },
    json: (value) => {
      out += JSON.stringify(value);
    },
    notice: (text) => {
      notices += `${text}\n`;
    },
  };
  return { code: await main(["up", ...DUMMY, ...options], output), out, notices };
}

describe("kivimesh up", () => {
  const saved = { ...process.env };

  afterEach(() => {
    process.env = { ...saved };
  });

  it("answers once through gRPC, reports, and ends", async () => {
    const report = join(mkdtempSync(join(tmpdir(), "kivimesh-up-")), "report.json");
    const { code, out, notices } = await up("--once", "--prompt", "hello", "--max-tokens", "5", "--report", report);
    expect(notices).not.toMatch(/error/i);
    expect(code).toBe(0);
    expect(out).toContain("> hello");
    expect(out).toMatch(/tokens\s+\d+ prompt, \d output/);
    const written = JSON.parse(await readFile(report, "utf8"));
    expect(written).toMatchObject({ model: "tiny-llama", kvFormat: "kivi2r", prompt: "hello" });
    const { gpu, peer, cachestore, computed } = written.promptTokensBySource;
    expect(gpu + peer + cachestore + computed).toBe(written.promptTokens);
  });

  it("says in one line that a port is taken, and leaves nothing open", async () => {
    const other = createServer();
    await new Promise<void>((resolve) => other.listen(0, "127.0.0.1", resolve));
    const { port } = other.address() as AddressInfo;
    try {
      const { code, notices } = await up("--http-port", String(port), "--grpc-port", "0");
      expect(code).toBe(2);
      expect(notices).toMatch(new RegExp(`127.0.0.1:${port}.*the port is taken; choose another`));
    } finally {
      await new Promise((resolve) => other.close(resolve));
    }
  });
});
