/** Runs the README's examples, as they are written, against a cluster that `kivimesh up` started. */
import { execFile, spawn } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, it } from "vitest";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
/** Modules there find the repository's packages. */
const WORK = join(ROOT, ".kivimesh", "readme");
const KIVIMESH = join(ROOT, "cli/bin/kivimesh.mjs");

interface Example {
  readonly prints: string;
  readonly language: string;
  readonly code: string;
}

/** Fenced blocks that say what they print. */
function examples(text: string): Example[] {
  return [...text.matchAll(/<!-- prints: (.+?) -->\n```(\w+)\n([\s\S]*?)```/g)].map((match) => ({
    prints: match[1] ?? "",
    language: match[2] ?? "",
    code: match[3] ?? "",
  }));
}

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}

describe("the README's examples", () => {
  const found = examples(readFileSync(join(ROOT, "README.md"), "utf8"));
  let cluster: ReturnType<typeof spawn>;
  let log = "";
  let httpPort: number;
  let grpcPort: number;

  beforeAll(async () => {
    [httpPort, grpcPort] = [await freePort(), await freePort()];
    mkdirSync(WORK, { recursive: true });
    const ports = ["--http-port", String(httpPort), "--grpc-port", String(grpcPort)];
    const data = ["--data-directory", join(WORK, "blocks"), "--workers", "1"];
    cluster = spawn(process.execPath, [KIVIMESH, "up", ...ports, ...data], { stdio: ["ignore", "pipe", "pipe"] });
    for (const stream of [cluster.stdout, cluster.stderr]) stream?.on("data", (chunk) => (log += chunk));
    for (;;) {
      if (cluster.exitCode !== null) throw new Error(`kivimesh up ended with ${cluster.exitCode}:\n${log}`);
      const response = await fetch(`http://127.0.0.1:${httpPort}/readyz`).catch(() => undefined);
      if (response?.ok === true) break;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  }, 180_000);

  afterAll(async () => {
    const ended = new Promise((resolve) => cluster.once("exit", resolve));
    cluster.kill("SIGTERM");
    const code = cluster.exitCode ?? (await ended);
    rmSync(WORK, { recursive: true, force: true });
    expect(code, log).toBe(0);
  });

  it("are there", () => {
    expect(found.map((example) => example.language)).toEqual(["sh", "sh", "js", "sh", "sh"]);
  });

  it.each(found)("$language: $code", async ({ language, code, prints }) => {
    const local = code.replaceAll("127.0.0.1:8000", `127.0.0.1:${httpPort}`);
    const env = { ...process.env, KIVIMESH_ADDRESS: `127.0.0.1:${grpcPort}` };
    let command: [string, string[]] = ["bash", ["-euc", local]];
    if (language === "js") {
      const file = join(WORK, "example.mjs");
      writeFileSync(file, local);
      command = [process.execPath, [file]];
    }
    const { stdout } = await promisify(execFile)(...command, { cwd: ROOT, env });
    expect(stdout).toContain(prints);
  });
});
