import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { commandLine, main } from "./main.ts";
import { keptOutput } from "./testing/kept-output.ts";

/** Runs a command line with its output kept. */
async function run(...argv: string[]): Promise<{ code: number; out: string; notices: string }> {
  const output = keptOutput();
  const write = (chunk: string | Uint8Array) => {
    output.notices += String(chunk);
    return true;
  };
  const spies = [
    vi.spyOn(process.stderr, "write").mockImplementation(write),
    vi.spyOn(process.stdout, "write").mockImplementation(write),
  ];
  try {
    const code = await main(argv, output);
    return { code, out: output.out, notices: output.notices };
  } finally {
    for (const spy of spies) spy.mockRestore();
  }
}

describe("the command line", () => {
  const saved = { ...process.env };

  beforeEach(() => {
    process.env.KIVIMESH_CACHE = mkdtempSync(join(tmpdir(), "kivimesh-main-"));
  });

  afterEach(() => {
    process.env = { ...saved };
  });

  it("exits 0 with help and version, 2 without a command", async () => {
    expect(await run("--help")).toMatchObject({
      code: 0,
      notices: expect.stringContaining("kivimesh pull smollm2-135m-instruct"),
    });
    expect(await run("--version")).toMatchObject({ code: 0, notices: expect.stringMatching(/^\d+\.\d+\.\d+\n$/) });
    expect((await run()).code).toBe(2);
  });

  it.each([
    [["up", "--workers", "none"], "expected a whole number from 1 to 64"],
    [["up", "--kv-format", "kivi3"], "Allowed choices are f16"],
    [["up", "--nonsense"], "unknown option '--nonsense'"],
    [["up", "--once"], "--once needs a --prompt"],
    [["worker", "--id", "a"], "--redis"],
    [["gateway", "--redis", "redis://127.0.0.1:1", "--http-port", "70000"], "from 0 to 65535"],
    [["run", " "], "the prompt is empty"],
    [["eval", "perplexity", "--text", "no-such-file", "--kv-format", "f16,kivi9"], "unknown KV format kivi9"],
    [["eval", "perplexity", "--text", "/no/such/file"], "cannot read /no/such/file"],
    [["up", "--once", "--prompt", " "], "--prompt is empty"],
    [["up", "--once", "--prompt", "hi", "--report", "/no/such/folder/report.json"], "/no/such/folder does not exist"],
    [["run", "hi", ...["a", "b", "c", "d", "e"].flatMap((text) => ["--stop", text])], "at most 4"],
    [["gateway", "--redis", "foo"], "it must be like redis://HOST:PORT"],
    [["pull", "hf:only-an-owner"], "not of the form hf:owner/repository"],
  ])("exits 2 and says what is allowed: %j", async (argv, message) => {
    const { code, notices } = await run(...argv);
    expect(notices).toContain(message);
    expect(code).toBe(2);
  });

  it("exits 1 in one line where the world is not as asked", async () => {
    const absent = await run("up", "--once", "--prompt", "hi");
    expect(absent).toMatchObject({
      code: 1,
      notices: expect.stringContaining("run: npx kivimesh pull smollm2-135m-instruct"),
    });
    const unreachable = await run("run", "--address", "127.0.0.1:1", "hi");
    expect(unreachable.code).toBe(1);
    expect(unreachable.notices.trim().split("\n")).toHaveLength(1);
    expect(unreachable.notices).toContain("no gateway answers at 127.0.0.1:1; start one with: npx kivimesh up");
    const noRedis = await run(
      "worker",
      "--redis",
      "redis://127.0.0.1:1",
      "--load-format",
      "dummy",
      "--architecture",
      "tiny-llama",
    );
    expect(noRedis.code).toBe(1);
    expect(noRedis.notices.trim()).toBe("no Redis answers at 127.0.0.1:1; is it running? [QUEUE_UNAVAILABLE]");
  });

  it("reads environment twins; a flag goes before them", async () => {
    process.env.KIVIMESH_WORKERS = "none";
    expect((await run("up", "--prompt", "x")).notices).toContain("KIVIMESH_WORKERS");
    expect((await run("up", "--workers", "1", "--once")).notices).toContain("--once needs a --prompt");
  });

  it("takes switches from the environment as on or off", async () => {
    process.env.KIVIMESH_JSON = "1";
    expect(JSON.parse((await run("models")).out)).toHaveProperty("available");
    process.env.KIVIMESH_JSON = "0";
    expect((await run("models")).out).toMatch(/^name +size +path/);
    process.env.KIVIMESH_JSON = "perhaps";
    expect(await run("models")).toMatchObject({
      code: 2,
      notices: expect.stringContaining("KIVIMESH_JSON: expected 1"),
    });
  });

  it("takes mandatory and repeated options from the environment", async () => {
    process.env.KIVIMESH_TEXT = "/no/such/file";
    expect((await run("eval", "perplexity")).notices).toContain("cannot read /no/such/file");
    process.env.KIVIMESH_ONCE = "true";
    expect((await run("up")).notices).toContain("--once needs a --prompt");
    process.env.KIVIMESH_TEMPERATURE = "hot";
    expect((await run("run", "hi")).notices).toContain("KIVIMESH_TEMPERATURE");
  });

  it("lists models as JSON", async () => {
    const { code, out } = await run("models", "--json");
    expect(code).toBe(0);
    expect(JSON.parse(out)).toMatchObject({
      cached: [],
      available: [{ name: "smollm2-135m-instruct", bytes: 98_362_432 }],
    });
  });

  it("documents every command with an example", () => {
    const program = commandLine({ output: { write() {}, line() {}, json() {}, notice() {} }, exitWith() {} });
    const leaves = program.commands.flatMap((command) => (command.commands.length > 0 ? command.commands : [command]));
    expect(leaves.map((command) => command.name()).sort()).toEqual(
      ["cachestore", "engine", "gateway", "models", "perplexity", "pull", "run", "throughput", "up", "worker"].sort(),
    );
    for (const command of leaves) {
      let help = "";
      command.configureOutput({
        writeOut: (text) => {
          help += text;
        },
      });
      command.outputHelp();
      expect(help, command.name()).toMatch(/Examples?:\n {2}(HF_TOKEN=\S+ )?kivimesh /);
    }
  });
});
