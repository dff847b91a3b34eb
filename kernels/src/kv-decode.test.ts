import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { readBuffer } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { halfToFloat } from "./half.ts";
import { type DecodeVariant, planSplits } from "./kv-decode.ts";
import { queryTiles } from "./kv-decode-split.ts";
import { kvFormat } from "./kv-format.ts";
import type { KvKernelOptions } from "./kv-kernels.ts";
import type { DecodeRow } from "./kv-steps.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { DecodeAttentionSetup } from "./testing/decode-attention-setup.ts";
import { assertNoPoison } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";

let gpu: Gpu;
beforeAll(async () => {
  gpu = await openGpu();
});
afterAll(() => gpu.close());

interface Case
  extends Partial<Pick<KvKernelOptions, "outputType" | "codeForm" | "numerics" | "ropeDim" | "unrolledDecode">> {
  readonly variant: DecodeVariant;
  readonly format: string;
  readonly headDim: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly blockTokens?: number;
}

// Every format and head size, shared heads that do not divide into tiles, both forms of codes, both outputs.
const CASES: readonly Case[] = [
  { variant: "packed", format: "kivi2", headDim: 128, heads: 1, kvHeads: 1, unrolledDecode: true },
  { variant: "packed", format: "kivi2r", headDim: 128, heads: 2, kvHeads: 1 },
  { variant: "packed", format: "kivi2", headDim: 64, heads: 1, kvHeads: 1, codeForm: "offset" },
  { variant: "packed", format: "kivi2r", headDim: 64, heads: 2, kvHeads: 2, outputType: "f16", blockTokens: 64 },
  { variant: "packed", format: "kivi4", headDim: 64, heads: 5, kvHeads: 1, ropeDim: 32 },
  { variant: "packed", format: "kivi4", headDim: 128, heads: 1, kvHeads: 1, codeForm: "offset" },
  { variant: "packed", format: "kivi-k4v2r", headDim: 64, heads: 2, kvHeads: 1 },
  { variant: "packed", format: "kivi-k2v4", headDim: 64, heads: 2, kvHeads: 2, numerics: "fast" },
  { variant: "half", format: "f16", headDim: 128, heads: 1, kvHeads: 1, outputType: "f16" },
  { variant: "half", format: "f16", headDim: 64, heads: 5, kvHeads: 1, numerics: "fast" },
];

const title = ({ variant, format, headDim, heads, kvHeads, codeForm, outputType, numerics }: Case) =>
  [variant, format, `D ${headDim}`, `${heads}/${kvHeads}`, codeForm, outputType, numerics].filter(Boolean).join(" ");

function create(c: Case, seed: number, interleaved: boolean): Promise<DecodeAttentionSetup> {
  const { variant, format, headDim, heads, kvHeads, blockTokens = 32, ...change } = c;
  return DecodeAttentionSetup.create(gpu, {
    ...change,
    format: kvFormat(format),
    shape: { layers: 1, kvHeads, headDim, blockTokens, residualTokens: 64 },
    heads,
    maxDecodeRows: 4,
    maxSlots: 4,
    maxDecodeSteps: 3,
    maxPagesPerSequence: 704 / blockTokens,
    maxPositions: 704,
    ropeLayout: interleaved ? "interleaved" : "half",
    decodeVariant: variant,
    seed,
  });
}

function tolerance({ variant, outputType, codeForm, format }: Case) {
  // f16 products: 2^-11 each, more where codes carry an offset or 16 levels.
  if (variant === "packed") return codeForm === "offset" || format.includes("4") ? 5e-4 : 5e-5;
  return outputType === "f16" ? 1e-6 : 1e-10;
}

function checkRows(c: Case, setup: DecodeAttentionSetup, rows: readonly DecodeRow[], output: Float32Array): void {
  for (const [i, row] of rows.entries()) {
    for (let head = 0; head < c.heads; head++) {
      const at = (i * c.heads + head) * c.headDim;
      const context = `position ${row.position}, head ${head}`;
      const nmse = tolerance(c);
      assertClose(context, output.subarray(at, at + c.headDim), setup.reference(row, head), { nmse, maxAbs: 0.3 });
    }
  }
}

describe.each(CASES.map((c) => [title(c), c] as const))("%s", (name, c) => {
  test("ragged rows equal the f64 reference, alone and together, at once and steps later", async () => {
    const random = seededRandom(name);
    const setup = await create(c, random.uint32(), random.integer(0, 1) === 0);
    // Nothing sealed; the first token of a window; more than one split; a full window.
    const positions = [random.integer(1, 63), random.pick([64, 128, 192]), random.integer(513, 640), 255];
    const rows = positions.map((position, i) => ({ slot: 3 - i, position }));
    const together = await setup.run(rows);
    assertNoPoison(name, (await setup.output.read()).slice(0, together.length * (c.outputType === "f16" ? 2 : 4)));
    checkRows(c, setup, rows, together);
    const halves = new Uint16Array(await setup.residual.read());
    for (const row of rows) {
      for (const plane of [0, 1] as const) {
        const plain = setup.newToken(row, plane);
        const at = ((row.slot * 2 + plane) * 64 + (row.position % 64)) * plain.length;
        const stored = Float32Array.from(halves.subarray(at, at + plain.length), halfToFloat);
        assertClose(`stored ${plane}`, stored, plain, { nmse: 1e-7, maxAbs: 4e-3 });
      }
    }
    expect(new Uint32Array(await readBuffer(gpu, setup.status))).toEqual(new Uint32Array(4));
    const behind = rows.slice(1).map(({ slot, position }) => ({ slot, position: position - 2 }));
    const width = c.heads * c.headDim;
    const later = await setup.run(behind, 2);
    if (c.numerics === "fast") checkRows(c, setup, rows.slice(1), later);
    else {
      assertSameBits("two steps later", later, together.subarray(width));
      assertSameBits("alone", await setup.run(rows.slice(2, 3)), together.subarray(2 * width, 3 * width));
    }
    setup.destroy();
  });
});

test.each(["kivi2r"])("%s: huge logits and equal ones", async (format) => {
  const random = seededRandom(`logits ${format}`);
  for (const queryDeviation of [0, 200]) {
    const c: Case = { variant: "packed", format, headDim: 64, heads: 2, kvHeads: 2 };
    const shape = { layers: 1, kvHeads: 2, headDim: 64, blockTokens: 32, residualTokens: 64 };
    const setup = await DecodeAttentionSetup.create(gpu, {
      format: kvFormat(format),
      shape,
      heads: 2,
      maxDecodeRows: 1,
      maxSlots: 1,
      maxPagesPerSequence: 8,
      maxPositions: 256,
      ropeLayout: "half",
      decodeVariant: "packed",
      seed: random.uint32(),
      queryDeviation,
    });
    const rows = [{ slot: 0, position: 200 }];
    const output = await setup.run(rows);
    // Logits in the hundreds: f16 rounds each to about 0.1, so weights of near rivals move; all must stay finite.
    expect(output.every(Number.isFinite)).toBe(true);
    if (queryDeviation === 0) checkRows(c, setup, rows, output);
    setup.destroy();
  }
});

test("keys and values beyond f16 are flagged in their slot", async () => {
  const c: Case = { variant: "half", format: "f16", headDim: 64, heads: 1, kvHeads: 1 };
  const setup = await create(c, 1, false);
  const qkv = new Float32Array(3 * 64);
  qkv[64 + 5] = 1e6;
  await setup.run([{ slot: 2, position: 3 }]);
  expect(new Uint32Array(await readBuffer(gpu, setup.status))).toEqual(new Uint32Array(4));
  await setup.runRaw(qkv, { slot: 2, position: 3 });
  expect(new Uint32Array(await readBuffer(gpu, setup.status))).toEqual(new Uint32Array([0, 0, 1, 0]));
  setup.destroy();
});

test("splits: fixed by position in invariant, by the batch in fast; tiles as equal as they can be", () => {
  expect(planSplits("invariant", 128, 1, 4096)).toEqual(planSplits("invariant", 128, 9999, 4096));
  expect(planSplits("fast", 128, 2048, 4096).splits).toBeLessThan(planSplits("fast", 128, 8, 4096).splits);
  expect(planSplits("fast", 64, 1, 100).splits).toBe(1);
  expect(queryTiles(71, 4)).toEqual({ queries: 4, tiles: 18 });
  expect(queryTiles(5, 4)).toEqual({ queries: 3, tiles: 2 });
});
