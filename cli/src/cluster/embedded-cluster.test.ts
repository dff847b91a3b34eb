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
import { keptOutput } from "../testing/kept-output.ts";

const DUMMY = ["--load-format", "dummy", "--architecture", "tiny-llama", "--workers", "1"];

function folder(): string {
  return mkdtempSync(join(tmpdir(), "kivimesh-up-"));
}

/** Runs `kivimesh up` in this process; `serving` is what it prints up to its last line. */
function upUntilServing(...options: string[]): { serving: Promise<string>; ended: Promise<number> } {
  let printed = "";
  let resolve = (_text: string): void => {};
  let reject = (_error: Error): void => {};
  const serving = new Promise<string>((served, failed) => {
    resolve = served;
    reject = failed;
  });
  const output: Output = {
    write() {},
    json() {},
    notice: (text) => {
      printed += `${text}\n`;
    },
    line: (text = "") => {
      printed += `${text}\n`;
      if (text.includes("Ctrl-C ends the cluster")) resolve(printed);
    },
  };
  const ended = main(["up", ...DUMMY, ...options], output);
  void ended.then((code) => reject(new Error(`ended with ${code}: ${printed}`)));
  return { serving, ended };
}

/** Runs `kivimesh up` in this process. */
async function up(...options: string[]): Promise<{ code: number; out: string; notices: string }> {
  const output = keptOutput();
  const code = await main(["up", ...DUMMY, ...options], output);
  return { code, out: output.out, notices: output.notices };
}

describe("kivimesh up", () => {
  const saved = { ...process.env };

  afterEach(() => {
    process.env = { ...saved };
  });

  it("answers once through gRPC, reports, and ends", async () => {
    const report = join(folder(), "report.json");
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

  it("prints where each part's metrics are, and serves them there", async () => {
    const cluster = upUntilServing(
      "--http-port",
      "0",
      "--grpc-port",
      "0",
      "--workers",
      "2",
      "--data-directory",
      folder(),
    );
    const urls = (await cluster.serving).match(/http:\S+\/metrics/g) ?? [];
    try {
      expect(urls).toHaveLength(4);
      const texts = await Promise.all(urls.map(async (url) => (await fetch(url)).text()));
      expect(texts[0]).toContain("kivimesh_gateway_");
      expect(texts[1]).toContain("kivimesh_worker_");
      expect(texts[2]).toContain("kivimesh_worker_");
      expect(texts[3]).toContain("kivimesh_cachestore_");
    } finally {
      process.emit("SIGTERM");
    }
    expect(await cluster.ended).toBe(0);
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
