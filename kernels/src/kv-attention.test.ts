import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Gpu, openGpu } from "./device.ts";
import type { LanePlan } from "./kv-attention-template.ts";
import type { DecodeVariant } from "./kv-decode.ts";
import { kvFormat } from "./kv-format.ts";
import type { PrefillVariant } from "./kv-prefill.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { type KvRow, KvSequences, type KvSetup } from "./testing/kv-sequences.ts";
import { type Random, seededRandom } from "./testing/random.ts";

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
  readonly lanePlan?: LanePlan;
  readonly blockTokens?: number;
  readonly decodeVariant?: DecodeVariant;
  readonly prefillVariant?: PrefillVariant;
}

// Every format, head size and query group at least once; MQA, and the variant without subgroup operations.
const CASES: readonly Case[] = [
  { format: "kivi2r", headDim: 64, heads: 3, kvHeads: 1 },
  { format: "kivi2r", headDim: 64, heads: 3, kvHeads: 1, lanePlan: { lanes: 32, subgroups: false } },
  { format: "kivi2r", headDim: 32, heads: 8, kvHeads: 1 },
  { format: "kivi4r", headDim: 128, heads: 2, kvHeads: 2 },
  { format: "kivi2", headDim: 96, heads: 4, kvHeads: 1, blockTokens: 64 },
  { format: "kivi-k4v2", headDim: 64, heads: 4, kvHeads: 2, blockTokens: 64 },
  { format: "kivi-k2v4", headDim: 32, heads: 2, kvHeads: 2 },
  { format: "f16", headDim: 80, heads: 6, kvHeads: 2 },
  { format: "f16", headDim: 64, heads: 2, kvHeads: 2, lanePlan: { lanes: 16, subgroups: false } },
];

const title = (c: Case) =>
  `${c.format} D ${c.headDim} ${c.heads}/${c.kvHeads}${c.lanePlan ? ` lanes ${c.lanePlan.lanes}` : ""}${c.decodeVariant ? ` ${c.decodeVariant}` : ""}`;

function setup(c: Case, random: Random, change: Partial<KvSetup> = {}): KvSetup {
  // Shapes stay fixed, so that a kept shader cache serves the next run; lengths, data and pairing vary.
  const blockTokens = c.blockTokens ?? 32;
  return {
    format: kvFormat(c.format),
    shape: { layers: 1, kvHeads: c.kvHeads, headDim: c.headDim, blockTokens, residualTokens: 64 },
    heads: c.heads,
    maxRows: 300,
    maxDecodeRows: 4,
    maxSlots: 4,
    maxPagesPerSequence: 20,
    maxPositions: 640,
    ropeLayout: random.pick(["interleaved", "half"]),
    theta: 10000,
    pages: 64,
    seed: random.uint32(),
    ...(c.lanePlan === undefined ? {} : { lanePlan: c.lanePlan }),
    ...(c.decodeVariant === undefined ? {} : { decodeVariant: c.decodeVariant }),
    ...(c.prefillVariant === undefined ? {} : { prefillVariant: c.prefillVariant }),
    ...change,
  };
}

const rowsOf = (slot: number, position: number, tokens: number): KvRow[] =>
  Array.from({ length: tokens }, (_, i) => ({ slot, position: position + i }));

async function checkRows(
  what: string,
  sequences: KvSequences,
  output: Float32Array,
  rows: readonly KvRow[],
  indices: Iterable<number>,
  phase: "prefill" | "decode",
): Promise<void> {
  const { heads, shape } = sequences.setup;
  const width = heads * shape.headDim;
  for (const i of indices) {
    const row = rows[i] as KvRow;
    const expected = await sequences.reference(row, phase === "prefill" ? i : undefined);
    const context = `${what}, slot ${row.slot}, position ${row.position}`;
    // Packed decode folds q and p into f16; matrices are of f16.
    const { decodeVariant, prefillVariant } = sequences.kernels;
    const halves = phase === "decode" ? decodeVariant === "packed" : prefillVariant === "matrix";
    const tolerance = halves ? { nmse: 2e-5, maxAbs: 5e-2 } : { nmse: 1e-10, maxAbs: 5e-5 };
    assertClose(context, output.subarray(i * width, (i + 1) * width), expected, tolerance);
  }
}

describe.each(CASES.map((c) => [title(c), c] as const))("%s", (name, c) => {
  test("prefill and decode equal the f64 reference over ragged lengths", async () => {
    const random = seededRandom(name);
    const sequences = await KvSequences.create(gpu, setup(c, random));
    // Two sequences side by side; window edges, splits of 256 and their neighbours.
    const first = random.pick([1, 63, 64, 65, 100]);
    const second = random.pick([128, 129, 191]);
    const chunks = [
      { slot: 3, position: 0, tokens: first },
      { slot: 1, position: 0, tokens: second },
    ];
    const rows = [...rowsOf(3, 0, first), ...rowsOf(1, 0, second)];
    const output = await sequences.prefill(chunks);
    const sample = [
      0,
      first - 1,
      first,
      rows.length - 1,
      random.integer(0, rows.length - 1),
      random.integer(0, rows.length - 1),
    ];
    await checkRows("prefill", sequences, output, rows, new Set(sample), "prefill");
    if (second === 128) {
      const tail = random.pick([150, 192]);
      const later = await sequences.prefill([{ slot: 1, position: 128, tokens: tail }]);
      await checkRows(
        "second chunk",
        sequences,
        later,
        rowsOf(1, 128, tail),
        new Set([0, 63, 64, 127, 128, tail - 1]),
        "prefill",
      );
    }
    let position = second === 128 ? 128 + 150 : second;
    if (second === 128) await sequences.prefill([{ slot: 1, position: 128, tokens: 150 }]);
    for (let step = 0; step < 70; step++, position++) {
      const batch = [
        { slot: 1, position },
        { slot: 3, position: first + step },
      ];
      const result = await sequences.decode(batch);
      const edge = batch.some((row) => [0, 1, 63].includes(row.position % 64));
      if (edge || step % 23 === 0) await checkRows("decode", sequences, result, batch, [0, 1], "decode");
    }
    await sequences.residual.read();
    await sequences.chunkKv.read();
    sequences.destroy();
  });
});

describe.each(["kivi2r", "kivi4", "f16"])("invariance, %s", (format) => {
  const shape = { format, headDim: 64, heads: 3, kvHeads: 1 };

  test("a row gets the same bits in any chunking, any batch, and after a prefix hit", async () => {
    const random = seededRandom(`invariance ${format}`);
    const sequences = await KvSequences.create(gpu, setup(shape, random));
    const { blockTokens } = sequences.setup.shape;
    const width = 3 * 64;
    const [a, b, hit] = [0, 1, 2];
    for (const slot of [b, hit]) sequences.restart(slot, sequences.names[a] as number);
    // Slot a: all at once. Slot b: in two chunks, beside a stranger.
    const whole = await sequences.prefill([{ slot: a, position: 0, tokens: 203 }]);
    const head = await sequences.prefill([
      { slot: 3, position: 0, tokens: 37 },
      { slot: b, position: 0, tokens: 128 },
    ]);
    const tail = await sequences.prefill([
      { slot: b, position: 128, tokens: 75 },
      { slot: 3, position: 0, tokens: 5 },
    ]);
    assertSameBits("first chunk", head.subarray(37 * width), whole.subarray(0, 128 * width));
    assertSameBits("second chunk", tail.subarray(0, 75 * width), whole.subarray(128 * width));
    // Slot hit: takes a's blocks up to 128 and computes the rest.
    sequences.sharePrefix(hit, a, 128 / blockTokens);
    const warm = await sequences.prefill([{ slot: hit, position: 128, tokens: 75 }]);
    assertSameBits("after a hit", warm, whole.subarray(128 * width));
    for (let block = 0; block < 192 / blockTokens; block++) {
      const sealed = await sequences.pageContent(a, block);
      expect(await sequences.pageContent(b, block)).toEqual(sealed);
      expect(await sequences.pageContent(hit, block)).toEqual(sealed);
    }
    // Decode to beyond the next window's end: alone, and in a batch at another place.
    for (let position = 203; position < 260; position++) {
      const alone = await sequences.decode([{ slot: a, position }]);
      const batch = await sequences.decode([
        { slot: 3, position: position - 198 },
        { slot: hit, position },
        { slot: b, position },
      ]);
      assertSameBits(`decode ${position}`, batch.subarray(width, 2 * width), alone);
      assertSameBits(`decode ${position}`, batch.subarray(2 * width), alone);
    }
    expect(await sequences.pageContent(b, (255 / blockTokens) | 0)).toEqual(
      await sequences.pageContent(a, (255 / blockTokens) | 0),
    );
    sequences.destroy();
  });

  test("tokens sealed by decode and by prefill make the same bytes", async () => {
    const random = seededRandom(`seal paths ${format}`);
    const sequences = await KvSequences.create(gpu, setup(shape, random));
    sequences.restart(1, sequences.names[0] as number);
    await sequences.prefill([{ slot: 0, position: 0, tokens: 64 }]);
    for (let position = 0; position < 64; position++) await sequences.decode([{ slot: 1, position }]);
    for (let block = 0; block < 64 / sequences.setup.shape.blockTokens; block++) {
      expect(await sequences.pageContent(1, block)).toEqual(await sequences.pageContent(0, block));
    }
    sequences.destroy();
  });

  test("a single huge logit, and equal logits", async () => {
    const random = seededRandom(`logits ${format}`);
    for (const queryDeviation of [0, 60]) {
      const sequences = await KvSequences.create(gpu, setup(shape, random, { queryDeviation }));
      const output = await sequences.prefill([{ slot: 0, position: 0, tokens: 150 }]);
      const { heads, shape: kv } = sequences.setup;
      const width = heads * kv.headDim;
      for (const i of [0, 64, 149]) {
        const expected = await sequences.reference({ slot: 0, position: i }, i);
        const got = output.subarray(i * width, (i + 1) * width);
        // Logits in the hundreds: an f32 rounding of a logit is 1e-5 of its weight.
        assertClose(`row ${i}`, got, expected, { nmse: 1e-7, maxAbs: 2e-3 });
      }
      sequences.destroy();
    }
  });
});

describe.each([undefined, "packed"] as const)("several decode steps, %s", (decodeVariant) => {
  test("one submit gives the bits of one step after the other, sealing included", async () => {
    const random = seededRandom(`steps ${decodeVariant}`);
    const change = { maxDecodeSteps: 5, outputType: "f16" as const };
    const variant = decodeVariant === undefined ? {} : { decodeVariant };
    const shape = { format: "kivi2r", headDim: 64, heads: 3, kvHeads: 1, ...variant };
    const options = setup(shape, random, change);
    const single = await KvSequences.create(gpu, options);
    const together = await KvSequences.create(gpu, options);
    const start = [126, 61];
    const chunks = start.map((tokens, slot) => ({ slot, position: 0, tokens }));
    await single.prefill(chunks);
    await together.prefill(chunks);
    const rows = start.map((position, slot) => ({ slot, position }));
    const outputs = await together.decodeSteps(rows, 5);
    for (const [step, output] of outputs.entries()) {
      const moved = rows.map(({ slot, position }) => ({ slot, position: position + step }));
      assertSameBits(`step ${step}`, output, await single.decode(moved));
    }
    for (const [slot, block] of [
      [0, 3],
      [1, 1],
    ] as const) {
      expect(await together.pageContent(slot, block)).toEqual(await single.pageContent(slot, block));
    }
    single.destroy();
    together.destroy();
  });
});

test("prefill by matrices, into f16", async () => {
  const random = seededRandom("matrix prefill");
  const c: Case = { format: "kivi2r", headDim: 32, heads: 2, kvHeads: 1, prefillVariant: "matrix" };
  const sequences = await KvSequences.create(gpu, setup(c, random, { outputType: "f16" }));
  const output = await sequences.prefill([{ slot: 2, position: 0, tokens: 70 }]);
  const width = 2 * 32;
  for (const i of [0, 63, 64, 69]) {
    const expected = await sequences.reference({ slot: 2, position: i }, i);
    assertClose(`row ${i}`, output.subarray(i * width, (i + 1) * width), expected, { nmse: 2e-5, maxAbs: 5e-2 });
  }
  sequences.destroy();
});

test("plans refuse chunks off a window, slots and positions out of range", async () => {
  const random = seededRandom("plans");
  const sequences = await KvSequences.create(gpu, setup(CASES[0] as Case, random));
  const { kernels } = sequences;
  expect(() => kernels.preparePrefill([{ slot: 0, position: 10, tokens: 5 }])).toThrow(/not a multiple of 64/);
  expect(() => kernels.preparePrefill([{ slot: 4, position: 0, tokens: 5 }])).toThrow(/slot 4/);
  expect(() => kernels.preparePrefill([{ slot: 0, position: 0, tokens: 301 }])).toThrow(/over 300 rows/);
  expect(() => kernels.prepareDecode([{ slot: 0, position: 640 }])).toThrow(/over the last/);
  expect(() => kernels.prepareDecode(rowsOf(0, 0, 5))).toThrow(/at most 4/);
  expect(() => kernels.prepareDecodeSteps(rowsOf(0, 0, 1), 2)).toThrow(/2 steps, must be 1..1/);
  expect(() => kernels.prepareSeal([{ slot: 0, position: 32 }])).toThrow(/not a multiple of 64/);
  expect(() => kernels.setPages(0, 19, [1, 2])).toThrow(/at most 20/);
  expect(kernels.preparePrefill([])).toEqual({ rows: 0, tiles: 0, blocks: 0 });
  sequences.destroy();
});
