import { readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { readBuffer, submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { type KvFormat, type KvShape, kvFormat } from "./kv-format.ts";
import { KV_STATUS_KEY_NOT_FINITE, KV_STATUS_VALUE_NOT_FINITE } from "./kv-kernels.ts";
import {
  codesPerWord,
  keyMetaOffset,
  keyWordOffset,
  kvPageLayout,
  pageBytes,
  valueMetaOffset,
  valueWordOffset,
} from "./kv-layout.ts";
import { decodePage, encodePage, quantizeGroup } from "./kv-page.ts";
import { createKvSeal, type KvSealVariant } from "./kv-seal.ts";
import { sealTileSupports } from "./kv-seal-tile.wgsl.ts";
import { compareArrays } from "./testing/comparison.ts";
import { assertNoPoison, createPoisoned, POISON_WORD } from "./testing/poison.ts";
import { type Random, seededRandom } from "./testing/random.ts";

interface GoldenGroup {
  name: string;
  bits: 2 | 4;
  strict: boolean;
  input: string;
  scale: string;
  zero: string;
  codes: string;
}

interface GoldenResult {
  keyScales: string;
  keyZeros: string;
  keyCodes: string;
  valueScales: string;
  valueZeros: string;
  valueCodes: string;
  decodedKeys: string;
  decodedValues: string;
}

interface GoldenPage {
  name: string;
  rotated: boolean;
  tokens: number;
  kvHeads: number;
  headDim: number;
  keys: string;
  values: string;
  keyNorms?: string;
  bits2: GoldenResult;
  bits4: GoldenResult;
}

interface Golden {
  groups: GoldenGroup[];
  nonFinite: { name: string; input: string }[];
  pages: GoldenPage[];
}

const golden = JSON.parse(readFileSync(new URL("../golden/quantize.json", import.meta.url), "utf8")) as Golden;

const hex = (text: string, digits: number) =>
  Array.from({ length: text.length / digits }, (_, i) => Number.parseInt(text.slice(i * digits, (i + 1) * digits), 16));
const floats = (text: string) => new Float32Array(Uint32Array.from(hex(text, 8)).buffer);

let gpu: Gpu;
beforeAll(async () => {
  gpu = await openGpu();
});
afterAll(() => gpu.close());

interface Sealed {
  readonly page: Uint8Array<ArrayBuffer>;
  readonly status: number;
}

/** Strides of the two sources: residual windows by slot, and rows of a prefill chunk. */
type Source = "residual" | "chunk";

/** Seals K and V given as f16 bits [tokens][kvHeads][headDim], one block, of slot 1 into page 2. */
async function sealOnGpu(
  variant: KvSealVariant,
  format: KvFormat,
  shape: KvShape,
  keys: ArrayLike<number>,
  values: ArrayLike<number>,
  from: Source = "residual",
): Promise<Sealed> {
  const row = (shape.kvHeads * shape.headDim) / 2;
  const window = shape.blockTokens * row;
  const strides =
    from === "residual"
      ? { tokenStride: row, planeStride: window, slotStride: 2 * window }
      : { tokenStride: 2 * row, planeStride: row, slotStride: 0 };
  const kernel = await createKvSeal(gpu, { format, shape, maxPages: 2, ...strides, variant });
  const bytes = pageBytes(format, shape);
  const source = createPoisoned(gpu, "source", 4 * window * 4);
  // The chunk's block begins at its token 3.
  const first = from === "residual" ? 0 : 3;
  for (let token = 0; token < shape.blockTokens; token++) {
    for (const [plane, data] of [keys, values].entries()) {
      const part = Uint16Array.from({ length: 2 * row }, (_, i) => data[token * 2 * row + i] as number);
      const at = strides.slotStride + (first + token) * strides.tokenStride + plane * strides.planeStride;
      gpu.device.queue.writeBuffer(source.buffer, at * 4, part);
    }
  }
  const pages = createPoisoned(gpu, "pages", 3 * bytes);
  const status = uploadStorage(gpu, "status", new Uint32Array(2));
  const bound = kernel.bind({
    source: source.buffer,
    seals: uploadStorage(gpu, "seals", new Uint32Array([first, 1, shape.blockTokens, 0])),
    pageTable: uploadStorage(gpu, "page table", new Uint32Array([0, 0, 0, 2])),
    pages: pages.buffer,
    status,
  });
  submitPass(gpu, (pass) => bound.encode(pass, 1));
  const all = await pages.read();
  const page = all.slice(2 * bytes);
  assertNoPoison("sealed page", page);
  expect(new Uint32Array(all, 0, bytes / 2).every((word) => word === POISON_WORD)).toBe(true);
  const flags = new Uint32Array(await readBuffer(gpu, status));
  expect(flags[0]).toBe(0);
  for (const { buffer } of [source, pages]) buffer.destroy();
  return { page: new Uint8Array(page), status: flags[1] as number };
}

const VARIANTS = ["loops", "tiles-memory"] as const;

// Software drivers take seconds to compile tiles, so these formats stand for the others, each at one shape.
const TILE_SHAPES: Record<string, KvShape> = {
  kivi2: { layers: 1, kvHeads: 2, headDim: 64, blockTokens: 64, residualTokens: 64 },
  kivi2r: { layers: 1, kvHeads: 2, headDim: 128, blockTokens: 32, residualTokens: 32 },
  "kivi-k4v2": { layers: 1, kvHeads: 1, headDim: 32, blockTokens: 32, residualTokens: 32 },
};

/** The page's fields in logical order, as in the golden file. */
function unpack(format: KvFormat, shape: KvShape, page: Uint8Array<ArrayBuffer>) {
  const words = new Uint32Array(page.buffer);
  const layout = kvPageLayout(format, shape);
  const { blockTokens, kvHeads, headDim } = shape;
  const keyMeta: number[] = [];
  const keyCodes: number[] = [];
  const valueMeta: number[] = [];
  const valueCodes: number[] = [];
  const code = (word: number, bits: number, index: number) => (word >>> (index * bits)) & (2 ** bits - 1);
  for (let token = 0; token < blockTokens; token++) {
    for (let head = 0; head < kvHeads; head++) {
      const base = head * layout.head;
      for (let channel = 0; channel < headDim; channel++) {
        const kPer = codesPerWord(format.keyBits);
        const vPer = codesPerWord(format.valueBits);
        const kWord =
          base + layout.keyCodes + keyWordOffset(headDim, format.keyBits, token, Math.floor(channel / kPer));
        keyCodes.push(code(words[kWord] as number, format.keyBits, channel % kPer));
        const vWord =
          base + layout.valueCodes + valueWordOffset(headDim, format.valueBits, token, Math.floor(channel / vPer));
        valueCodes.push(code(words[vWord] as number, format.valueBits, channel % vPer));
        if (token % 32 === 0) {
          keyMeta.push(words[base + layout.keyMeta + keyMetaOffset(headDim, format.keyBits, token, channel)] as number);
        }
        if (channel % 32 === 0) {
          valueMeta.push(words[base + layout.valueMeta + valueMetaOffset(headDim, token, channel / 32)] as number);
        }
      }
    }
  }
  const norms = Array.from(new Uint16Array(page.buffer, layout.norms * 4));
  return { keyMeta, keyCodes, valueMeta, valueCodes, norms };
}

const scales = (meta: number[]) => meta.map((word) => word & 0xffff);
const zeros = (meta: number[]) => meta.map((word) => word >>> 16);

describe("golden groups on the host", () => {
  test.each(golden.groups.map((group) => [`${group.name}, ${group.bits} bits`, group] as const))("%s", (_, group) => {
    const result = quantizeGroup(floats(group.input), group.bits);
    expect(result.scale).toBe(Number.parseInt(group.scale, 16));
    expect(result.zero).toBe(Number.parseInt(group.zero, 16));
    expect(result.codes.map((code) => code.toString(16)).join("")).toBe(group.codes);
  });

  test.each(golden.nonFinite)("$name is refused", ({ input }) => {
    expect(() => quantizeGroup(hex(input, 4).map(halfToFloat), 2)).toThrow(RangeError);
  });
});

describe.each([2, 4] as const)("golden groups sealed by the kernel at %i bits", (bits) => {
  test.each(VARIANTS)("as channels of K and as tokens of V: %s", async (variant) => {
    const exact = golden.groups.filter(
      (group) =>
        group.bits === bits && group.strict && floats(group.input).every((x) => halfToFloat(floatToHalf(x)) === x),
    );
    expect(exact.length).toBeGreaterThan(20);
    const format = kvFormat(`kivi${bits}`);
    const shape = { layers: 1, kvHeads: 1, headDim: 32, blockTokens: 32, residualTokens: 32 };
    for (let first = 0; first < exact.length; first += 32) {
      const groups = Array.from({ length: 32 }, (_, i) => exact[(first + i) % exact.length] as GoldenGroup);
      const inputs = groups.map((group) => Array.from(floats(group.input), floatToHalf));
      const keys = Array.from({ length: 1024 }, (_, i) => inputs[i % 32]?.[Math.floor(i / 32)] as number);
      const { page, status } = await sealOnGpu(variant, format, shape, keys, inputs.flat());
      expect(status).toBe(0);
      const result = unpack(format, shape, page);
      const scale = groups.map((group) => Number.parseInt(group.scale, 16));
      const zero = groups.map((group) => Number.parseInt(group.zero, 16));
      expect(scales(result.keyMeta)).toEqual(scale);
      expect(zeros(result.keyMeta)).toEqual(zero);
      expect(scales(result.valueMeta)).toEqual(scale);
      expect(zeros(result.valueMeta)).toEqual(zero);
      for (const [i, group] of groups.entries()) {
        const wanted = hex(group.codes, 1);
        expect(
          result.keyCodes.filter((_, at) => at % 32 === i),
          `${group.name} as K`,
        ).toEqual(wanted);
        expect(result.valueCodes.slice(i * 32, i * 32 + 32), `${group.name} as V`).toEqual(wanted);
      }
    }
  });
});

describe.each(golden.pages.map((page) => [page.name, page] as const))("golden page: %s", (_, page) => {
  test.each([2, 4] as const)("%i bits, kernel and host", async (bits) => {
    const format = kvFormat(`kivi${bits}${page.rotated ? "r" : ""}`);
    const { tokens, kvHeads, headDim } = page;
    const shape = { layers: 1, kvHeads, headDim, blockTokens: tokens, residualTokens: tokens };
    // One rotated page is enough for the tiles: each shape is compiled anew.
    const tiled = sealTileSupports(format, shape) && page === golden.pages.find(({ rotated }) => rotated);
    const wanted = bits === 2 ? page.bits2 : page.bits4;
    const keys = hex(page.keys, 4);
    const values = hex(page.values, 4);
    const variants = VARIANTS.filter((variant) => variant === "loops" || (tiled && bits === 2));
    const sealed = await Promise.all(variants.map((variant) => sealOnGpu(variant, format, shape, keys, values)));
    expect(sealed.map(({ status }) => status)).toEqual(variants.map(() => 0));
    const onHost = encodePage(format, shape, {
      keys: Float32Array.from(keys, halfToFloat),
      values: Float32Array.from(values, halfToFloat),
    });
    for (const bytes of [...sealed.map(({ page: bytes }) => bytes), onHost]) {
      const result = unpack(format, shape, bytes);
      if (page.keyNorms !== undefined) expect(result.norms).toEqual(hex(page.keyNorms, 4));
      expect(scales(result.keyMeta)).toEqual(hex(wanted.keyScales, 4));
      expect(zeros(result.keyMeta)).toEqual(hex(wanted.keyZeros, 4));
      expect(result.keyCodes).toEqual(hex(wanted.keyCodes, 1));
      expect(scales(result.valueMeta)).toEqual(hex(wanted.valueScales, 4));
      expect(zeros(result.valueMeta)).toEqual(hex(wanted.valueZeros, 4));
      expect(result.valueCodes).toEqual(hex(wanted.valueCodes, 1));
      const decoded = decodePage(format, shape, bytes);
      const row = kvHeads * headDim;
      for (const [plane, text] of [
        [decoded.keys, wanted.decodedKeys],
        [decoded.values, wanted.decodedValues],
      ] as const) {
        const ends = [...plane.subarray(0, row), ...plane.subarray((tokens - 1) * row)];
        const expected = floats(text);
        const largest = expected.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
        expect(compareArrays(ends, expected).maxAbs).toBeLessThanOrEqual(1e-5 * largest);
      }
    }
  });
});

const SEALED_FORMATS = [
  ...["f16", "kivi2", "kivi2r", "kivi4r", "kivi-k4v2", "kivi-k2v4"].map((name) => [name, "loops"] as const),
  ...Object.keys(TILE_SHAPES).map((name) => [name, "tiles-memory"] as const),
];

function randomShape(random: Random, format: KvFormat): KvShape {
  const headDim = random.pick(format.rotated ? [32, 64, 128] : [32, 64, 96, 128]);
  const blockTokens = random.pick([32, 64]);
  return { layers: 1, kvHeads: random.pick([1, 2, 3]), headDim, blockTokens, residualTokens: blockTokens };
}

// Software drivers take long to compile tiles, the first time.
describe.each(SEALED_FORMATS)("sealing as %s: %s", { timeout: 400_000 }, (name, variant) => {
  test("random and extreme pages equal the host quantizer's", async () => {
    const random = seededRandom(`seal ${name} ${variant}`);
    const format = kvFormat(name);
    const shape = variant === "loops" ? randomShape(random, format) : (TILE_SHAPES[name] as KvShape);
    const { headDim } = shape;
    const from = random.pick(["residual", "chunk"] as const);
    const count = shape.blockTokens * shape.kvHeads * headDim;
    const kinds: [string, () => number][] = [
      ["normal", () => random.normal(random.pick([0, 20]), 8)],
      ["all zero", () => 0],
      ["constant", () => -3.5],
      ["extremes", () => (format.rotated ? random.normal(0, 1000) : random.pick([65504, -65504]))],
      ["subnormal", () => random.integer(-1023, 1023) * 2 ** -24],
      ["ties", () => random.integer(-6, 6) / 2],
      ["offset", () => random.normal(300, 0.2)],
      ["sparse", () => (random.uniform() < 0.02 ? random.normal(0, 100) : 0)],
    ];
    for (const [kind, draw] of kinds) {
      const keys = Uint16Array.from({ length: count }, () => floatToHalf(draw()));
      const values = Uint16Array.from({ length: count }, () => floatToHalf(draw()));
      if (kind === "normal") keys.fill(0, 0, shape.kvHeads * headDim); // a token of norm zero
      const { page, status } = await sealOnGpu(variant, format, shape, keys, values, from);
      expect(status, kind).toBe(0);
      const input = { keys: Float32Array.from(keys, halfToFloat), values: Float32Array.from(values, halfToFloat) };
      const expected = encodePage(format, shape, input);
      const different = page.reduce((sum, byte, i) => sum + (byte === expected[i] ? 0 : 1), 0);
      // Sums of squares in another order may move a norm, and with it its token's codes, by a rounding.
      expect(different, `${kind}: bytes that differ`).toBeLessThanOrEqual(format.rotated ? page.length / 100 : 0);
      const ours = decodePage(format, shape, page);
      const theirs = decodePage(format, shape, expected);
      expect(compareArrays(ours.keys, theirs.keys).nmse, kind).toBeLessThan(1e-4);
      expect(compareArrays(ours.values, theirs.values).nmse, kind).toBeLessThan(1e-4);
    }
  });

  test.each([
    ["NaN", 0x7e00],
    ["infinity", 0x7c00],
    ["minus infinity", 0xfc00],
  ])("%s in K or V is flagged", async (_, bad) => {
    const format = kvFormat(name);
    const small = { layers: 1, kvHeads: 2, headDim: 32, blockTokens: 32, residualTokens: 32 };
    const shape = variant === "loops" ? small : (TILE_SHAPES[name] as KvShape);
    const length = shape.blockTokens * shape.kvHeads * shape.headDim;
    const good = Uint16Array.from({ length }, (__, i) => floatToHalf(Math.sin(i)));
    const broken = good.slice();
    broken[Math.floor(0.6 * length)] = bad;
    expect((await sealOnGpu(variant, format, shape, good, good)).status).toBe(0);
    expect((await sealOnGpu(variant, format, shape, broken, good)).status & KV_STATUS_KEY_NOT_FINITE).not.toBe(0);
    expect((await sealOnGpu(variant, format, shape, good, broken)).status & KV_STATUS_VALUE_NOT_FINITE).not.toBe(0);
  });
});

test.each(VARIANTS)("a rotated V whose group no longer fits f16 is flagged: %s", async (variant) => {
  const shape = TILE_SHAPES.kivi2r as KvShape;
  const count = shape.blockTokens * shape.kvHeads * shape.headDim;
  const keys = new Uint16Array(count).fill(floatToHalf(1));
  const values = new Uint16Array(count).fill(floatToHalf(60000));
  const { status } = await sealOnGpu(variant, kvFormat("kivi2r"), shape, keys, values);
  expect(status).toBe(KV_STATUS_VALUE_NOT_FINITE);
});
