/** `npm start` as its user sees it: the report, and Ctrl-C in the middle of a stream. */
import { execFile } from "node:child_process";
import { mkdtemp, readFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { describe, expect, it } from "vitest";
import { ClusterProcess, freePort, until } from "./cluster.ts";

const run = promisify(execFile);
const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const START = join(ROOT, "scripts/start.mjs");

describe("npm start", () => {
  it("answers a first prompt, writes the report and exits with --once", async () => {
    const directory = await mkdtemp(join(tmpdir(), "kivimesh-start-"));
    const file = join(directory, "report.json");
    const { stdout } = await run(
      process.execPath,
      [START, "--once", "--prompt", "What is the capital of France?", "--report", file],
      { cwd: ROOT },
    );
    const report = JSON.parse(await readFile(file, "utf8"));
    expect(report.text).toContain("Paris");
    expect(stdout).toContain("Paris");
    expect(report).toMatchObject({
      model: "smollm2-135m-instruct",
      kvFormat: "kivi2r",
      prompt: "What is the capital of France?",
    });
    expect(report.outputTokens).toBeGreaterThan(0);
    expect(report.ttftSeconds).toBeGreaterThan(0);
    expect(report.kv.f16Bytes).toBeGreaterThan(0);
    const { gpu, peer, cachestore, computed } = report.promptTokensBySource;
    expect(gpu + peer + cachestore + computed).toBe(report.promptTokens);
  }, 300_000);

  it("ends with exit code 0 in under 5 s on Ctrl-C in the middle of a stream, and leaves no process", async () => {
    const httpPort = await freePort();
    const start = new ClusterProcess(
      "npm start",
      "npm",
      [
        ...["start", "--", "--http-port", String(httpPort), "--grpc-port", String(await freePort())],
        ...["--prompt", "Write a long story about a lighthouse.", "--max-tokens", "1000"],
      ],
      { cwd: ROOT },
    );
    try {
      await until(
        "a running stream",
        async () => {
          const response = await fetch(`http://127.0.0.1:${httpPort}/metrics`).catch(() => undefined);
          return /^kivimesh_gateway_requests_running(?:\{[^}]*\})? [1-9]/m.test((await response?.text()) ?? "");
        },
        120_000,
      );
      expect(await processesOfGroup(start.child.pid)).not.toEqual([]);
      const asked = Date.now();
      expect(await start.interrupt(), start.output).toBe(0);
      expect(Date.now() - asked).toBeLessThan(5_000);
      expect(await processesOfGroup(start.child.pid)).toEqual([]);
    } finally {
      start.killGroup();
    }
  }, 300_000);
});

async function processesOfGroup(group: number | undefined): Promise<string[]> {
  const { stdout } = await run("ps", ["-eo", "pgid=,pid=,stat=,args="]);
  const lines = stdout.split("\n").map((line) => line.trim());
  return lines.filter((line) => line.startsWith(`${group} `) && !/^\d+ +\d+ +Z/.test(line));
}
