import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it } from "vitest";
import { main } from "../main.ts";
import { jsonOf } from "../testing/json-command.ts";

const dummy = ["--model", "dummy:tiny-llama"];

type SweepRows = readonly { readonly decodeTokensPerSecond?: number; readonly skipped?: string }[];

const memory = {
  weights: expect.any(Number),
  kv: expect.any(Number),
  kvPages: expect.any(Number),
  kvResidual: expect.any(Number),
  activations: expect.any(Number),
  other: expect.any(Number),
  total: expect.any(Number),
};

/** What a command line is refused with, and its exit code. */
async function refusal(...argv: string[]): Promise<{ code: number; notices: string }> {
  const notices: string[] = [];
  const output = { write() {}, line() {}, json() {}, notice: (text: string) => notices.push(text) };
  return { code: await main(argv, output), notices: notices.join("\n") };
}

it("bench engine --json has every promised field", async () => {
  const dummyFlags = ["--load-format", "dummy", "--architecture", "tiny-llama", "--kv-format", "kivi4"];
  const size = ["--batch", "2", "--prompt-tokens", "140", "--output-tokens", "5"];
  const result = (await jsonOf("bench", "engine", ...dummyFlags, ...size, "--json")) as {
    prefillTokensPerSecond: number;
    decodeTokensPerSecond: number;
    ttftSeconds: number;
    totalSeconds: number;
    peakGpuBytes: Record<string, number>;
  };
  expect(result).toEqual({
    device: expect.stringMatching(/\S/),
    model: "tiny-llama",
    kvFormat: "kivi4",
    batch: 2,
    promptTokens: 140,
    outputTokens: 5,
    prefillTokensPerSecond: expect.any(Number),
    decodeTokensPerSecond: expect.any(Number),
    ttftSeconds: expect.any(Number),
    totalSeconds: expect.any(Number),
    interTokenMs: { p50: expect.any(Number), p90: expect.any(Number), p99: expect.any(Number) },
    decodeStep: expect.objectContaining({
      steps: expect.any(Number),
      encodeMs: expect.any(Number),
      wallMs: expect.any(Number),
    }),
    peakGpuBytes: memory,
  });
  expect(result.prefillTokensPerSecond).toBeCloseTo((2 * 140) / result.ttftSeconds, 3);
  expect(result.decodeTokensPerSecond).toBeGreaterThan(0);
  expect(result.totalSeconds).toBeGreaterThan(result.ttftSeconds);
  for (const part of ["weights", "kvPages", "kvResidual", "activations"]) {
    expect(result.peakGpuBytes[part], part).toBeGreaterThan(0);
  }
}, 120_000);

it("bench engine sweeps batch and context, skips what does not fit, and writes files", async () => {
  const folder = mkdtempSync(join(tmpdir(), "kivimesh-bench-"));
  try {
    const size = ["--batch", "1,2", "--context", "100,3000", "--output-tokens", "3", "--out", join(folder, "sweep")];
    const rows = (await jsonOf("bench", "engine", ...dummy, ...size, "--json")) as Record<string, unknown>[];
    expect(rows.map(({ batch, promptTokens }) => [batch, promptTokens])).toEqual([
      [1, 100],
      [2, 100],
      [1, 3000],
      [2, 3000],
    ]);
    expect(rows.map((row) => typeof row.decodeTokensPerSecond)).toEqual(["number", "number", "undefined", "undefined"]);
    expect(rows[3]?.skipped).toMatch(/at most 2048 tokens/);
    expect(readdirSync(folder)).toEqual(expect.arrayContaining(["sweep.csv", "sweep.json", "sweep-decode.svg"]));
    expect(JSON.parse(readFileSync(join(folder, "sweep.json"), "utf8"))).toEqual(rows);
  } finally {
    rmSync(folder, { recursive: true });
  }
}, 120_000);

it("bench throughput runs a whole workload on each KV format", async () => {
  const size = ["--workload", "5x140+9", "--kv-format", "f16,kivi2", "--max-sequences", "3"];
  const rows = (await jsonOf("bench", "throughput", ...dummy, ...size, "--json")) as Record<string, unknown>[];
  expect(rows.map(({ kvFormat }) => kvFormat)).toEqual(["f16", "kivi2"]);
  for (const row of rows) {
    expect(row).toMatchObject({
      model: "tiny-llama",
      numerics: "invariant",
      workload: "5x140+9",
      measured: "whole",
      outputTokens: 5 * 9,
      promptTokens: 5 * 140,
      maxSequences: 3,
      preemptions: 0,
      peakGpuBytes: memory,
    });
    expect(row.outputTokensPerSecond).toBeCloseTo(45 / (row.seconds as number), 3);
    expect(row.largestBatch).toBeLessThanOrEqual(3);
  }
  const [half, two] = rows.map(({ peakGpuBytes }) => (peakGpuBytes as Record<string, number>).kvPages as number);
  expect(two).toBeLessThan((half as number) / 4);
}, 120_000);

it("bench throughput --memory fills the budget, and refuses one that holds nothing", async () => {
  const size = ["--workload", "3x140+4", "--kv-format", "kivi2r", "--memory", "620MiB"];
  const [row] = (await jsonOf("bench", "throughput", ...dummy, ...size, "--json")) as Record<string, unknown>[];
  expect(row).toMatchObject({
    memoryBytes: 620 * 2 ** 20,
    limitedBy: "maxSequences",
    maxSequences: 3,
    outputTokens: 12,
  });
  const { total, kvPages } = (row?.peakGpuBytes ?? {}) as Record<string, number>;
  expect(total).toBeLessThan(620 * 2 ** 20);
  expect(kvPages).toBeGreaterThan(10 * 2 ** 20);
  const tight = await refusal("bench", "throughput", ...dummy, "--memory", "100MiB");
  expect(tight).toMatchObject({ code: 1, notices: expect.stringContaining("hold no sequence of 499 tokens") });
}, 120_000);

it("bench engine --memory keeps to the budget and skips what it does not hold", async () => {
  const size = ["--batch", "1", "--context", "100,1500", "--output-tokens", "2", "--memory"];
  const { notices } = await refusal("bench", "engine", ...dummy, ...size, "1MiB");
  const least = Number(/one needs (\d+) bytes/.exec(notices)?.[1]);
  const rows = (await jsonOf("bench", "engine", ...dummy, ...size, `${least + 1e5}`, "--json")) as SweepRows;
  expect(rows[0]?.decodeTokensPerSecond).toBeGreaterThan(0);
  expect(rows[1]?.skipped).toMatch(/tokens of KV, \d+ fit/);
}, 120_000);

it("bench throughput --seconds measures a part in which the batch is full", async () => {
  const size = ["--workload", "6x130+120", "--max-sequences", "3", "--seconds", "1"];
  const [row] = (await jsonOf("bench", "throughput", ...dummy, ...size, "--json")) as Record<string, unknown>[];
  expect(row).toMatchObject({ measured: "steady", largestBatch: 3 });
  expect(row?.seconds).toBeGreaterThan(0.99);
  expect(row?.seconds).toBeLessThan(10);
  expect(row?.outputTokens).toBeGreaterThan(0);
}, 120_000);

it.each([
  [["engine", "--batch", "0"], /from 1 to 1024/],
  [["engine", "--batch", "1,,2"], /parted by commas/],
  [["engine", "--json", "--csv", ...dummy], /one of them/],
  [["engine", "--model", "dummy:gpt"], /unknown architecture "gpt"/],
  [["throughput", "--workload", "8x9"], /1000x161\+338/],
  [["throughput", "--kv-format", "f17"], /allowed are f16/],
  [["throughput", "--numerics", "exact"], /invariant, fast/],
  [["throughput", "--model", "dummy:gpt"], /unknown architecture "gpt"/],
  [["throughput", "--seconds", "0"], /from 0.1/],
  [["throughput", "--memory", "1GiB", "--kv-bytes", "1MiB", ...dummy], /give one of them/],
  [["engine", "--memory", "1GiB", "--kv-bytes", "1MiB", ...dummy], /give one of them/],
])("bench %j is refused", async (argv, message) => {
  const written: string[] = [];
  const original = process.stderr.write.bind(process.stderr);
  process.stderr.write = ((text: string) => written.push(text) > 0) as typeof process.stderr.write;
  try {
    const { code, notices } = await refusal("bench", ...argv);
    expect(code).toBe(2);
    expect(notices + written.join("")).toMatch(message);
  } finally {
    process.stderr.write = original;
  }
});
