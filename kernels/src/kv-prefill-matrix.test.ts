import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { kvFormat } from "./kv-format.ts";
import { prefillMatrixWgsl } from "./kv-prefill-matrix.wgsl.ts";
import {
  type PrefillMatrixPlan,
  planPrefillMatrix,
  prefillMatrixMemory,
  prefillMatrixSizes,
} from "./kv-prefill-matrix-plan.ts";
import type { PrefillChunk } from "./kv-steps.ts";
import { assertSameBits, compareArrays } from "./testing/comparison.ts";
import { assertNoPoison } from "./testing/poison.ts";
import { PrefillAttentionSetup } from "./testing/prefill-attention-setup.ts";
import { seededRandom } from "./testing/random.ts";

let gpu: Gpu;
beforeAll(async () => {
  gpu = await openGpu();
});
afterAll(() => gpu.close());

interface Case {
  readonly format: string;
  readonly headDim: number;
  readonly heads: number;
  readonly kvHeads: number;
  /** tileRows, queryHeads, rowBlocks, columnGroups. */
  readonly plan: readonly [number, number, number, number];
  readonly loads?: PrefillMatrixPlan["loads"];
  readonly window?: number;
  readonly output?: "f16" | "f32";
  readonly arithmetic?: "f16" | "f32";
}

// Every format, each way to share the work, head sizes and groups, windows as short as a group.
const CASES: readonly Case[] = [
  { format: "kivi2r", headDim: 32, heads: 2, kvHeads: 1, plan: [32, 1, 2, 1] },
  { format: "kivi2r", headDim: 64, heads: 3, kvHeads: 1, plan: [16, 3, 1, 1], output: "f16" },
  { format: "kivi2r", headDim: 128, heads: 1, kvHeads: 1, plan: [16, 1, 1, 1], arithmetic: "f32" },
  { format: "kivi4r", headDim: 32, heads: 4, kvHeads: 2, plan: [32, 2, 2, 2], window: 32 },
  { format: "kivi2", headDim: 96, heads: 1, kvHeads: 1, plan: [16, 1, 1, 1], output: "f16" },
  { format: "kivi4", headDim: 32, heads: 4, kvHeads: 1, plan: [16, 4, 4, 2] },
  { format: "kivi-k4v2r", headDim: 32, heads: 2, kvHeads: 2, plan: [32, 1, 2, 2] },
  { format: "kivi-k4v2", headDim: 32, heads: 2, kvHeads: 2, plan: [32, 1, 1, 1], loads: "mixed" },
  {
    format: "kivi-k2v4",
    headDim: 32,
    heads: 2,
    kvHeads: 2,
    plan: [16, 1, 1, 1],
  },
  { format: "f16", headDim: 48, heads: 2, kvHeads: 1, plan: [16, 2, 2, 1], arithmetic: "f32" },
  { format: "f16", headDim: 64, heads: 2, kvHeads: 2, plan: [32, 1, 2, 2], output: "f16" },
];

const title = ({ format, headDim, heads, kvHeads, plan, loads = "late", output = "f32" }: Case) =>
  `${format} D ${headDim} ${heads}/${kvHeads}, ${plan.join(" ")}, ${loads}, ${output}`;

interface Run {
  readonly chunks: readonly PrefillChunk[];
  readonly seed: number;
  readonly queryDeviation?: number;
  readonly names?: readonly number[];
}

/** Runs one batch; checks that all of the output was written, and nothing behind it. */
async function attend(c: Case, run: Run): Promise<{ setup: PrefillAttentionSetup; output: Float32Array<ArrayBuffer> }> {
  const [tileRows, queryHeads, rowBlocks, columnGroups] = c.plan;
  const window = c.window ?? 64;
  const format = kvFormat(c.format);
  const shape = { layers: 1, kvHeads: c.kvHeads, headDim: c.headDim, blockTokens: 32, residualTokens: window };
  const output = c.output ?? "f32";
  const setup = new PrefillAttentionSetup(gpu, { format, shape, heads: c.heads, output, maxPages: 16, ...run });
  const plan = {
    tileRows,
    queryHeads,
    rowBlocks,
    columnGroups,
    queries: "shared",
    loads: c.loads ?? "late",
  } as const;
  const code = prefillMatrixWgsl({
    format,
    shape,
    heads: c.heads,
    maxPages: setup.maxPages,
    scale: 1 / Math.sqrt(c.headDim),
    plan,
    dialect: "emulated",
    arithmetic: gpu.features.shaderF16 ? (c.arithmetic ?? "f16") : "f32",
    output,
  });
  const kernel = await cachedKernel(gpu, {
    label: "prefill attention",
    code,
    bindings: ["read", "read", "read", "read", "read", "read_write"],
    immediateBytes: 8,
  });
  const tiles = setup.tiles(tileRows);
  const { qkv, pages, kvRows, pageTable } = setup;
  const bound = kernel.bind([qkv, pages, kvRows, tiles.buffer, pageTable, setup.output.buffer]);
  submitPass(gpu, (pass) => bound.encode(pass, new Uint32Array([1, 0]), [tiles.count, c.heads / queryHeads]));
  const result = await setup.readOutput();
  assertNoPoison(title(c), await setup.output.read());
  return { setup, output: result };
}

/** Largest relative error of any row's head. */
function worstError(c: Case, setup: PrefillAttentionSetup, output: Float32Array, rows: Iterable<number>): number {
  let worst = 0;
  for (const row of rows) {
    for (let head = 0; head < c.heads; head++) {
      const at = (row * c.heads + head) * c.headDim;
      const { nmse } = compareArrays(output.subarray(at, at + c.headDim), setup.reference(row, head));
      worst = Math.max(worst, Math.sqrt(nmse));
    }
  }
  return worst;
}

describe.each(CASES.map((c) => [title(c), c] as const))("%s", (name, c) => {
  test("equals the f64 reference over ragged chunks", async () => {
    const random = seededRandom(name);
    const window = c.window ?? 64;
    const chunks = [
      { slot: 1, position: 3 * window, tokens: random.pick([1, window - 1, window + 1, 2 * window + 17]) },
      { slot: 0, position: 0, tokens: random.pick([1, window, window + 33]) },
    ];
    const { setup, output } = await attend(c, { chunks, seed: random.uint32() });
    const rows = new Set([0, setup.rows - 1]);
    while (rows.size < Math.min(setup.rows, 12)) rows.add(random.integer(0, setup.rows - 1));
    expect(worstError(c, setup, output, rows)).toBeLessThan(2e-3);
    setup.destroy();
  });
});

describe.each(CASES.filter((c) => ["kivi2r", "kivi4r", "f16"].includes(c.format)).map((c) => [title(c), c] as const))(
  "%s",
  (name, c) => {
    // Deviations of 1 hardly ever scale an output again; with 6 nearly every tile does, for some of its queries.
    test.each([1, 6])("a row's bits do not depend on the batch, deviation %d", async (queryDeviation) => {
      const random = seededRandom(`${name} ${queryDeviation}`);
      const window = c.window ?? 64;
      const seed = random.uint32();
      const tokens = 2 * window + 9;
      const whole = await attend(c, { chunks: [{ slot: 0, position: window, tokens }], seed, queryDeviation });
      const width = c.heads * c.headDim;
      const other = random.integer(1, 2 * window);
      // The same sequence again, ending earlier, from another window on, and beside a stranger.
      const beside = await attend(c, {
        chunks: [
          { slot: 2, position: window, tokens: other },
          { slot: 1, position: window, tokens: window + 3 },
        ],
        names: [7, 0],
        seed,
        queryDeviation,
      });
      assertSameBits(
        "ends earlier",
        beside.output.subarray(other * width),
        whole.output.slice(0, (window + 3) * width),
      );
      const later = await attend(c, {
        chunks: [{ slot: 0, position: 2 * window, tokens: tokens - window }],
        seed,
        queryDeviation,
      });
      assertSameBits("starts later", later.output, whole.output.slice(window * width));
      // A logit's rounding in f16 grows with it.
      const bound = queryDeviation === 1 ? 2e-3 : 2e-2;
      expect(worstError(c, whole.setup, whole.output, [0, window, tokens - 1])).toBeLessThan(bound);
      for (const { setup } of [whole, beside, later]) setup.destroy();
    });
  },
);

test("plans that do not fit are refused", () => {
  const shape = { layers: 1, kvHeads: 2, headDim: 64, blockTokens: 32, residualTokens: 64 };
  const sizes = (plan: Partial<PrefillMatrixPlan>, headDim = 64) =>
    prefillMatrixSizes({
      format: kvFormat("f16"),
      shape: { ...shape, headDim },
      heads: 6,
      maxPages: 1,
      scale: 1,
      plan: {
        tileRows: 32,
        queryHeads: 1,
        rowBlocks: 2,
        columnGroups: 1,
        queries: "shared",
        loads: "late",
        ...plan,
      },
      dialect: "emulated",
      arithmetic: "f32",
      output: "f32",
    });
  expect(sizes({}).threads).toBe(32);
  expect(() => sizes({ queryHeads: 2 })).toThrow(/do not divide 6\/2/);
  expect(() => sizes({ tileRows: 40 })).toThrow(/rowGroups is 1.25/);
  expect(() => sizes({ rowBlocks: 1, columnGroups: 4 })).toThrow(/keyBlocks is 0.5/);
  expect(() => sizes({}, 72)).toThrow(/not a multiple of 16/);
});

test("the plan of a model fits its heads, its windows and 48 KiB", () => {
  const cases: readonly (readonly [number, number, number, number, readonly [number, number] | undefined])[] = [
    [32, 8, 128, 128, [32, 4]],
    [32, 32, 128, 128, [128, 1]],
    [32, 32, 128, 32, [32, 1]],
    [32, 8, 128, 64, [32, 4]],
    [64, 8, 128, 128, [16, 8]],
    [9, 3, 64, 128, [64, 1]],
    [6, 2, 96, 128, [128, 1]],
    [8, 8, 80, 128, undefined],
    [8, 8, 256, 128, undefined],
  ];
  for (const [heads, kvHeads, headDim, window, expected] of cases) {
    const shape = { layers: 1, kvHeads, headDim, blockTokens: 32, residualTokens: window };
    for (const dialect of ["device", "emulated"] as const) {
      const plan = planPrefillMatrix(shape, heads, dialect);
      expect(plan && [plan.tileRows, plan.queryHeads]).toEqual(expected);
      if (plan === undefined) continue;
      const rest = { maxPages: 1, scale: 1, dialect, arithmetic: "f16", output: "f16" } as const;
      const template = { format: kvFormat("kivi2"), shape, heads, plan, ...rest };
      expect(prefillMatrixSizes(template).threads).toBe(2 * plan.tileRows * plan.queryHeads);
      if (dialect === "device") expect(prefillMatrixMemory(template)).toBeLessThanOrEqual(48 * 1024);
    }
  }
});
