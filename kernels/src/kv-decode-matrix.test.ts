import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { createKernel, type Kernel } from "./kernel.ts";
import { attentionReference, ropeReference } from "./kv-attention.reference.ts";
import {
  type DecodeMatrixTemplate,
  decodeMatrixSupports,
  decodeMatrixTemplate,
  decodeMatrixTiles,
  decodeMatrixWgsl,
} from "./kv-decode-matrix.wgsl.ts";
import { DECODE_SPLIT_IMMEDIATES } from "./kv-decode-split.ts";
import { type KvShape, kvFormat } from "./kv-format.ts";
import { decodePage, encodePage, hadamard, type KvPageValues } from "./kv-page.ts";
import { buildRopeTable, ropeFrequencies } from "./rope-table.ts";
import { assertClose, assertSameBits } from "./testing/comparison.ts";
import { createPoisoned, POISON_WORD } from "./testing/poison.ts";
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
  readonly queries: number;
}

// Two widths of codes on either side, rotation, ragged tiles of queries, two operands of queries, two rounds of K.
const CASES: readonly Case[] = [
  { format: "kivi2r", headDim: 64, heads: 3, kvHeads: 1, queries: 2 },
  { format: "kivi-k4v2", headDim: 64, heads: 2, kvHeads: 1, queries: 2 },
  { format: "kivi-k2v4", headDim: 64, heads: 5, kvHeads: 1, queries: 5 },
  { format: "kivi2", headDim: 128, heads: 2, kvHeads: 2, queries: 1 },
];

const BLOCK = 64;
const SPLIT = 96;
/** More than 32 groups: lanes hold the pages of 32 groups at a time. */
const LONG_SPLIT = 1120;
const MAX_POSITIONS = 1300;
const THETA = 10000;

const splitsOf = (splitTokens: number) => Math.ceil(MAX_POSITIONS / splitTokens);

/** One row's sequence: its position, and pages with what they hold. */
interface Sequence {
  readonly position: number;
  readonly pages: readonly KvPageValues[];
  readonly first: number;
  readonly query: Float32Array;
}

class Batch {
  readonly shape: KvShape;
  readonly template: DecodeMatrixTemplate;
  readonly sequences: readonly Sequence[];
  readonly #bytes: Uint8Array<ArrayBuffer>[] = [];
  readonly #kernel: Kernel;

  constructor(kernel: Kernel, template: DecodeMatrixTemplate, random: Random, positions: readonly number[]) {
    this.#kernel = kernel;
    this.template = template;
    this.shape = template.shape;
    this.sequences = positions.map((position) => this.#sequence(random, position));
  }

  static kernel(template: DecodeMatrixTemplate): Promise<Kernel> {
    return createKernel(gpu, {
      label: "decode matrix",
      code: decodeMatrixWgsl(template),
      bindings: ["read", "read", "read", "read", "read_write", "read"],
      immediateBytes: DECODE_SPLIT_IMMEDIATES * 4,
    });
  }

  #sequence(random: Random, position: number): Sequence {
    const { kvHeads, headDim } = this.shape;
    const { format, heads } = this.template;
    const first = this.#bytes.length;
    const pages = Array.from({ length: Math.floor(position / BLOCK) }, () => {
      const keys = random.normals(BLOCK * kvHeads * headDim);
      // Keys of uneven channels and tokens, as real ones have.
      for (let i = 0; i < keys.length; i++) keys[i] = (keys[i] as number) * (i % 7 === 0 ? 4 : 1);
      const page = encodePage(format, this.shape, { keys, values: random.normals(keys.length) });
      this.#bytes.push(page);
      return decodePage(format, this.shape, page);
    });
    return { position, pages, first, query: random.normals(heads * headDim, 1.5) };
  }

  /** Runs rows of these sequences, in an order of pages that is not theirs; partials as f32, one row after another. */
  async run(rows: readonly number[], step: number, splitTokens = SPLIT): Promise<Float32Array> {
    const splits = splitsOf(splitTokens);
    const { heads } = this.template;
    const { kvHeads, headDim } = this.shape;
    const width = (heads + 2 * kvHeads) * headDim;
    const maxPages = this.template.maxPages;
    const count = this.#bytes.length;
    const qkv = new Float32Array(rows.length * width).fill(Number.NaN);
    const table = new Uint32Array(rows.length * maxPages).fill(0xffff_ffff);
    const rowTable = new Uint32Array(rows.length * 4);
    rows.forEach((index, row) => {
      const { position, pages, first, query } = this.sequences[index] as Sequence;
      qkv.set(query, row * width);
      pages.forEach((_, i) => {
        table[row * maxPages + i] = count - 1 - (first + i);
      });
      rowTable.set([position - step, row, 0, 0], row * 4);
    });
    const bytes = new Uint8Array(this.#bytes.reduce((sum, page) => sum + page.length, 0));
    this.#bytes.forEach((page, i) => {
      bytes.set(page, (count - 1 - i) * page.length);
    });
    const partials = createPoisoned(gpu, "partials", rows.length * heads * splits * (headDim + 2) * 4);
    const buffers = [qkv, bytes, rowTable, table].map((data, i) => uploadStorage(gpu, `input ${i}`, data));
    const ropeTable = uploadStorage(
      gpu,
      "rope",
      buildRopeTable({ ropeDim: this.template.ropeDim, theta: THETA, maxPositions: MAX_POSITIONS }),
    );
    const bound = this.#kernel.bind([...buffers, partials.buffer, ropeTable]);
    const immediates = new Uint32Array(DECODE_SPLIT_IMMEDIATES).fill(1);
    immediates.set([1, 0, step, splitTokens, splits]);
    submitPass(gpu, (pass) => bound.encode(pass, immediates, [splits, decodeMatrixTiles(this.template), rows.length]));
    const result = new Float32Array(await partials.read());
    for (const buffer of [...buffers, ropeTable, partials.buffer]) buffer.destroy();
    return result;
  }

  /** A head's partials merged in f64, and un-rotated: what attention over the sealed tokens is. */
  merged(partials: Float32Array, row: number, index: number, head: number, splitTokens = SPLIT): Float32Array {
    const splits = splitsOf(splitTokens);
    const { headDim } = this.shape;
    const stride = headDim + 2;
    const used = Math.ceil(((this.sequences[index] as Sequence).pages.length * BLOCK) / splitTokens);
    const at = (split: number) => ((row * this.template.heads + head) * splits + split) * stride;
    let top = Number.NEGATIVE_INFINITY;
    for (let split = 0; split < used; split++) top = Math.max(top, partials[at(split) + headDim] as number);
    const sum = new Float64Array(headDim);
    let total = 0;
    for (let split = 0; split < used; split++) {
      const factor = 2 ** ((partials[at(split) + headDim] as number) - top);
      total += (partials[at(split) + headDim + 1] as number) * factor;
      for (let c = 0; c < headDim; c++) sum[c] = (sum[c] as number) + (partials[at(split) + c] as number) * factor;
    }
    const output = Float32Array.from(sum, (x) => x / total);
    if (this.template.format.rotated) hadamard(output);
    return output;
  }

  reference(index: number, head: number): Float64Array {
    const { position, pages, query } = this.sequences[index] as Sequence;
    const { kvHeads, headDim } = this.shape;
    const kvHead = Math.floor(head / (this.template.heads / kvHeads));
    const turned = Float64Array.from(query.subarray(head * headDim, (head + 1) * headDim));
    const frequencies = ropeFrequencies({ ropeDim: this.template.ropeDim, theta: THETA });
    ropeReference(turned, position, frequencies, this.template.ropeLayout);
    const read = (plane: "keys" | "values") => (token: number, channel: number) =>
      pages[Math.floor(token / BLOCK)]?.[plane][((token % BLOCK) * kvHeads + kvHead) * headDim + channel] as number;
    return attentionReference(turned, pages.length * BLOCK, this.template.scale, read("keys"), read("values"));
  }
}

function template(c: Case, random: Random): DecodeMatrixTemplate {
  return {
    format: kvFormat(c.format),
    shape: { layers: 1, kvHeads: c.kvHeads, headDim: c.headDim, blockTokens: BLOCK, residualTokens: BLOCK },
    heads: c.heads,
    queries: c.queries,
    maxPages: Math.ceil(MAX_POSITIONS / BLOCK),
    scale: 1 / Math.sqrt(c.headDim),
    ropeDim: c.headDim / 2,
    ropeLayout: random.pick(["half", "interleaved"]),
    dialect: "emulated",
  };
}

describe("decode split on 8-bit matrices, written out", () => {
  test.each(CASES)(
    "$format D $headDim $heads/$kvHeads",
    async (c) => {
      const random = seededRandom(`decode matrix ${c.format} ${c.headDim}`);
      const plan = template(c, random);
      const { headDim } = plan.shape;
      // Ragged: less than a block sealed, part of the last split, several splits; and one for a long split.
      const positions = [
        random.integer(0, BLOCK - 1),
        random.integer(BLOCK, 3 * BLOCK),
        random.integer(300, 390),
        random.integer(1190, 1290),
      ];
      const batch = new Batch(await Batch.kernel(plan), plan, random, positions);
      const step = random.integer(0, 3) > 0 ? 0 : Math.min(2, ...positions);
      const partials = await batch.run([0, 1, 2], step);
      const words = new Uint32Array(partials.buffer);
      for (const [row, { pages }] of batch.sequences.slice(0, 3).entries()) {
        const used = Math.ceil((pages.length * BLOCK) / SPLIT);
        for (let head = 0; head < c.heads; head++) {
          const at = (row * c.heads + head) * splitsOf(SPLIT) * (headDim + 2);
          const unused = words.subarray(at + used * (headDim + 2), at + splitsOf(SPLIT) * (headDim + 2));
          expect(unused.every((word) => word === POISON_WORD)).toBe(true);
          if (used === 0) continue;
          const context = `row ${row} at ${positions[row]}, head ${head}, seed ${random.seed}`;
          const got = batch.merged(partials, row, row, head);
          assertClose(context, got, batch.reference(row, head), { nmse: 4e-6, maxAbs: 0.05 });
        }
      }
      // A row's bits do not depend on the rows beside it.
      const alone = await batch.run([2], step);
      assertSameBits("alone", alone, partials.slice(2 * alone.length, 3 * alone.length));
      const long = await batch.run([3], 0, LONG_SPLIT);
      const got = batch.merged(long, 0, 3, 0, LONG_SPLIT);
      assertClose(`long split, seed ${random.seed}`, got, batch.reference(3, 0), { nmse: 4e-6, maxAbs: 0.05 });
    },
    600_000,
  );

  test("which formats and shapes there are kernels for", () => {
    const shape = { layers: 1, kvHeads: 2, headDim: 128, blockTokens: 64, residualTokens: 64 };
    expect(decodeMatrixSupports(kvFormat("kivi2r"), shape, 16)).toBe(true);
    expect(decodeMatrixSupports(kvFormat("f16"), shape, 16)).toBe(false);
    expect(decodeMatrixSupports(kvFormat("kivi2"), { ...shape, headDim: 96 }, 16)).toBe(false);
    expect(decodeMatrixSupports(kvFormat("kivi2"), shape, 8)).toBe(false);
  });

  test.each([
    [71, 1, 8, 9],
    [64, 8, 8, 8],
    [28, 4, 7, 4],
    [40, 4, 5, 8],
  ])("tiles of %i query heads of %i KV heads", (heads, kvHeads, queries, tiles) => {
    const c = { format: "kivi2", headDim: 64, heads, kvHeads, queries: 1 };
    const tiled = decodeMatrixTemplate(template(c, seededRandom("tiles")));
    expect(tiled.queries).toBe(queries);
    expect(decodeMatrixTiles(tiled)).toBe(tiles);
  });
});
