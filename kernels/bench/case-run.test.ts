import { afterAll, beforeAll, expect, test } from "vitest";
import { createKernel, type Gpu, openGpu, uploadStorage } from "../src/index.ts";
import { createPoisoned } from "../src/testing/poison.ts";
import { seededRandom } from "../src/testing/random.ts";
import { benchTable } from "./bench-report.ts";
import { type BenchResult, isFailure, meetsFloor, parsePeers, withPeer } from "./bench-result.ts";
import { CaseUnsupportedError } from "./case-error.ts";
import { runCases } from "./case-run.ts";
import { runsPerSample, SOFTWARE_TIMING } from "./case-timing.ts";
import { CASE_LISTS } from "./cases/case-lists.ts";
import { type DeviceRoofs, measureRoofs } from "./device-roofs.ts";
import type { KernelCase } from "./kernel-case.ts";

const random = seededRandom("case-run");
let gpu: Gpu;
let roofs: DeviceRoofs;

beforeAll(async () => {
  gpu = await openGpu();
  roofs = await measureRoofs(gpu, SOFTWARE_TIMING);
});
afterAll(() => gpu.close());

const WORDS = 4096;

/** Doubles f32 values; `factor` 2 is right. */
function doubling(variant: string, factor: number, skipped = 0): KernelCase {
  return {
    kernel: "doubling",
    shape: `${WORDS}`,
    variant,
    numerics: "invariant",
    bytes: WORDS * 8,
    flops: WORDS,
    roof: "bytes",
    peer: "doubling",
    floor: "≥ 1 × peer",
    async prepare(device) {
      const values = random.normals(WORDS);
      const kernel = await createKernel(device, {
        label: "doubling",
        code: `@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read_write> output: array<f32>;
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3u) { if (id.x >= ${skipped}u) { output[id.x] = input[id.x] * ${factor}.0; } }`,
        bindings: ["read", "read_write"],
      });
      const input = uploadStorage(device, "input", values);
      const output = createPoisoned(device, "output", WORDS * 4);
      const bound = kernel.bind([input, output.buffer]);
      return {
        encode: (pass) => bound.encode(pass, undefined, [WORDS / 64]),
        poison: () => output.reset(),
        async check() {
          const got = new Float32Array(await output.read());
          let difference = 0;
          let norm = 0;
          values.forEach((value, index) => {
            difference += ((got[index] as number) - 2 * value) ** 2;
            norm += (2 * value) ** 2;
          });
          return Math.sqrt(difference / norm);
        },
        tolerance: 1e-6,
        destroy() {
          input.destroy();
          output.buffer.destroy();
        },
      };
    },
  };
}

function refusing(error: Error): KernelCase {
  return { ...doubling(error.name, 2), prepare: () => Promise.reject(error) };
}

function run(cases: readonly KernelCase[], deadline = Number.POSITIVE_INFINITY): Promise<BenchResult[]> {
  return runCases(cases, { gpu, roofs, timing: SOFTWARE_TIMING, deadline, onResult: () => undefined });
}

test("right, wrong, unfinished, refusing and failing cases are a row each", async () => {
  const rows = await run([
    doubling("right", 2),
    doubling("wrong", 3),
    doubling("unfinished", 2, 64),
    refusing(new CaseUnsupportedError("no matrices here")),
    refusing(new RangeError("bad shape")),
    doubling("right again", 2),
  ]);
  expect(rows.map(isFailure)).toEqual([false, true, true, false, true, false]);
  const [right, wrong, unfinished, skipped, failed, again] = rows;
  expect(right?.ms).toBeGreaterThan(0);
  expect(right?.gbPerSecond).toBeCloseTo((WORDS * 8) / (right?.ms ?? 0) / 1e6, 2);
  expect(right?.spread?.[0]).toBeLessThanOrEqual(right?.ms ?? 0);
  expect(right?.spread?.[1]).toBeGreaterThanOrEqual(right?.ms ?? 0);
  expect(wrong?.relativeError).toBeCloseTo(0.5, 2);
  expect(unfinished?.relativeError).toBeNaN();
  expect(skipped).toMatchObject({ skipped: "no matrices here" });
  expect(failed?.error).toContain("bad shape");
  expect(again?.ms).toBeGreaterThan(0);
  const table = benchTable(rows, {
    device: gpu.name,
    date: "2026-01-01T00:00:00Z",
    commit: "c0ffee",
    roofs,
    timing: SOFTWARE_TIMING,
  });
  expect(table).toContain("commit c0ffee");
  expect(table.split("\n").filter((line) => line.startsWith("| doubling"))).toHaveLength(6);
  expect(table).toContain("**failed**: RangeError: bad shape");
});

test("cases that have not begun in time are not run", async () => {
  expect(await run([doubling("late", 2)], performance.now() - 1)).toEqual([
    expect.objectContaining({ variant: "late", skipped: "the time was up" }),
  ]);
});

test("peers join by key, from the file or from printed lines, and decide the floor", async () => {
  const [row] = (await run([doubling("right", 2)])) as [BenchResult];
  const ms = (row.ms as number) * 2;
  const file = JSON.stringify(
    { device: "x", peers: { doubling: { key: "doubling", ms }, other: { error: "no" } } },
    null,
    1,
  );
  const lines = `{"device": "x"}\nnoise\n${JSON.stringify({ key: "doubling", ms })}\n`;
  for (const text of [file, lines]) {
    const joined = withPeer(row, parsePeers(text));
    expect(joined.ratio).toBeCloseTo(2, 2);
    expect(joined.floorMet).toBe(true);
  }
  expect(withPeer(row, new Map([["doubling", ms / 4]])).floorMet).toBe(false);
  expect(withPeer(row, new Map())).toEqual(row);
});

test.each([
  ["≥ 2.2 TB/s", { gbPerSecond: 2300 }, true],
  ["≥ 2.2 TB/s", { gbPerSecond: 2100 }, false],
  ["≥ 230 TFLOP/s", { tflops: 229 }, false],
  ["≤ 60 µs", { ms: 0.05 }, true],
  ["≤ 0.06 ms", { ms: 0.07 }, false],
  ["≥ 3.9 × peer", {}, undefined],
  ["as kivi2", { ms: 1 }, undefined],
])("the floor %s of %o: %s", (floor, figures, met) => {
  const row: BenchResult = {
    kernel: "k",
    shape: "s",
    numerics: "fast",
    variant: "v",
    roof: "bytes",
    floor,
    ...figures,
  };
  expect(meetsFloor(row)).toBe(met);
});

test("samples are long enough for short kernels and not too long for long ones", () => {
  const plan = { warmSeconds: 0.3, samples: 7, minimumRuns: 20, sampleMilliseconds: 3 };
  expect(runsPerSample(1, plan)).toBe(20);
  expect(runsPerSample(0.005, plan)).toBe(600);
  expect(runsPerSample(50, plan)).toBe(5);
  expect(runsPerSample(1000, plan)).toBe(1);
});

test("the first tiny case of every list is right on this device", async () => {
  const first = CASE_LISTS.flatMap((list) => list("tiny").slice(0, 1));
  const rows = await run(first);
  expect(rows.filter(isFailure)).toEqual([]);
  expect(rows).toHaveLength(CASE_LISTS.length);
});
