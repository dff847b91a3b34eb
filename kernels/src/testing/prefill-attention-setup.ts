/** Random pages, rows and queries for prefill attention, and its f64 reference over the same stored bytes. */
import { createStorage, uploadStorage } from "../buffers.ts";
import type { Gpu } from "../device.ts";
import { floatToHalf, halfToFloat } from "../half.ts";
import { attentionReference } from "../kv-attention.reference.ts";
import type { KvFormat, KvShape } from "../kv-format.ts";
import { kvPageLayout } from "../kv-layout.ts";
import { decodePage, type KvPageValues } from "../kv-page.ts";
import { createKvStepTables, type PrefillChunk, TILE_WORDS } from "../kv-steps.ts";
import { createPoisoned, type PoisonedBuffer } from "./poison.ts";
import { Random } from "./random.ts";

export interface PrefillAttentionOptions {
  readonly format: KvFormat;
  readonly shape: KvShape;
  readonly heads: number;
  readonly chunks: readonly PrefillChunk[];
  readonly output: "f32" | "f16";
  readonly seed: number;
  /** Deviation of q: 1 gives logits of about the keys' own size. */
  readonly queryDeviation?: number;
  /** Pages of a row of the page table. Default: as many as the longest chunk needs. */
  readonly maxPages?: number;
  /** Seed of each chunk's sequence, so that equal ones have equal tokens. Default: its slot. */
  readonly names?: readonly number[];
}

/** Normal numbers that are halves; rows are slices of them at random places: fast enough for gigabytes. */
function normalHalves(random: Random): Uint16Array<ArrayBuffer> {
  return Uint16Array.from({ length: 1 << 17 }, () => floatToHalf(random.normal()));
}

/** Fills `target` with numbers of the table from a random place on. */
function fillSlice(target: Float32Array | Uint16Array, table: Float32Array | Uint16Array, random: Random): void {
  for (let done = 0; done < target.length; ) {
    const at = random.uint32() & 0xffff;
    const count = Math.min(target.length - done, table.length - at);
    target.set(table.subarray(at, at + count), done);
    done += count;
  }
}

/** A page with random codes, scales, zeros and norms as sealing makes them. */
function randomPage(format: KvFormat, shape: KvShape, random: Random, normals: Uint16Array): Uint32Array<ArrayBuffer> {
  const layout = kvPageLayout(format, shape);
  const words = new Uint32Array(layout.page);
  const normal = () => normals[random.uint32() & 0xffff] as number;
  const section = (from: number, to: number, bits: number) => {
    for (let i = from; i < to; i++) {
      words[i] = bits === 16 ? (normal() | (normal() << 16)) >>> 0 : random.uint32();
    }
  };
  const meta = (from: number, to: number, bits: number) => {
    const levels = 2 ** bits - 1;
    for (let i = from; i < to; i++) {
      const low = random.uniform(-2.5, -1);
      words[i] = (floatToHalf((random.uniform(1, 2.5) - low) / levels) | (floatToHalf(low) << 16)) >>> 0;
    }
  };
  for (let head = 0; head < shape.kvHeads; head++) {
    const at = head * layout.head;
    section(at, at + layout.keyMeta, format.keyBits);
    meta(at + layout.keyMeta, at + layout.valueCodes, format.keyBits);
    section(at + layout.valueCodes, at + layout.valueMeta, format.valueBits);
    meta(at + layout.valueMeta, at + layout.head, format.valueBits);
  }
  for (let i = layout.norms; i < layout.page; i++) {
    words[i] = (floatToHalf(random.uniform(0.5, 1.5)) | (floatToHalf(random.uniform(0.5, 1.5)) << 16)) >>> 0;
  }
  return words;
}

export class PrefillAttentionSetup {
  readonly options: PrefillAttentionOptions;
  readonly rows: number;
  readonly maxPages: number;
  readonly output: PoisonedBuffer;
  readonly qkv: GPUBuffer;
  readonly pages: GPUBuffer;
  readonly kvRows: GPUBuffer;
  readonly pageTable: GPUBuffer;
  readonly #gpu: Gpu;
  readonly #tiles: GPUBuffer[] = [];
  readonly #qkvData: Float32Array<ArrayBuffer>;
  readonly #rowData: Uint16Array<ArrayBuffer>;
  readonly #pageData: Uint32Array[] = [];
  readonly #decoded = new Map<number, KvPageValues>();
  readonly #table: Uint32Array<ArrayBuffer>;

  constructor(gpu: Gpu, options: PrefillAttentionOptions) {
    this.#gpu = gpu;
    this.options = options;
    const { shape, heads, chunks, format, seed, queryDeviation = 1 } = options;
    const { kvHeads, headDim, blockTokens } = shape;
    this.rows = chunks.reduce((sum, { tokens }) => sum + tokens, 0);
    const normals = normalHalves(new Random(seed));
    const queries = Float32Array.from(normals, (half) => halfToFloat(half) * queryDeviation);
    const width = (heads + 2 * kvHeads) * headDim;
    this.#qkvData = new Float32Array(this.rows * width);
    this.#rowData = new Uint16Array(this.rows * 2 * kvHeads * headDim);
    const slots = 1 + chunks.reduce((most, { slot }) => Math.max(most, slot), 0);
    this.maxPages =
      options.maxPages ??
      Math.max(...chunks.map(({ position, tokens }) => Math.ceil((position + tokens) / blockTokens)));
    this.#table = new Uint32Array(slots * this.maxPages).fill(0xffff);
    let row = 0;
    const order = new Random(seed + 1);
    const total = chunks.reduce((sum, { position, tokens }) => sum + Math.floor((position + tokens) / blockTokens), 0);
    const free = Array.from({ length: total }, (_, i) => i).sort(() => order.uniform() - 0.5);
    chunks.forEach(({ slot, position, tokens }, i) => {
      const name = options.names?.[i] ?? slot;
      for (let block = 0; block < Math.floor((position + tokens) / blockTokens); block++) {
        const page = free.pop() as number;
        this.#table[slot * this.maxPages + block] = page;
        const random = new Random(seed ^ Math.imul(name + 1, 0x9e3779b1) ^ Math.imul(block + 1, 0x85ebca6b));
        this.#pageData[page] = randomPage(format, shape, random, normals);
      }
      for (let token = 0; token < tokens; token++, row++) {
        const random = new Random(seed ^ Math.imul(name + 1, 0x7f4a7c15) ^ Math.imul(position + token + 1, 0xc2b2ae35));
        fillSlice(this.#qkvData.subarray(row * width, row * width + heads * headDim), queries, random);
        const plane = 2 * kvHeads * headDim;
        fillSlice(this.#rowData.subarray(row * plane, (row + 1) * plane), normals, random);
      }
    });
    this.qkv = uploadStorage(gpu, "qkv", this.#qkvData);
    this.kvRows = uploadStorage(gpu, "kv rows", this.#rowData);
    this.pageTable = uploadStorage(gpu, "page table", this.#table);
    const pageWords = kvPageLayout(format, shape).page;
    this.pages = createStorage(gpu, "pages", Math.max(1, total) * pageWords * 4);
    this.#pageData.forEach((words, page) => {
      gpu.device.queue.writeBuffer(this.pages, page * pageWords * 4, words as Uint32Array<ArrayBuffer>);
    });
    this.output = createPoisoned(gpu, "attention", this.rows * heads * headDim * (options.output === "f16" ? 2 : 4));
  }

  /** The tile table for a tile height, and its number of tiles. */
  tiles(tileRows: number): { readonly buffer: GPUBuffer; readonly count: number } {
    const { format, shape, chunks } = this.options;
    const tables = createKvStepTables({
      format,
      shape,
      maxRows: this.rows,
      maxDecodeRows: 1,
      maxDecodeSteps: 1,
      maxSlots: 1 + Math.max(...chunks.map(({ slot }) => slot)),
      maxPositions: 1 << 24,
      tileRows,
    });
    const { tiles: count } = tables.fillPrefill(chunks);
    const buffer = uploadStorage(this.#gpu, "tiles", tables.prefillTiles.subarray(0, count * TILE_WORDS));
    this.#tiles.push(buffer);
    return { buffer, count };
  }

  /** Operations of one run: two products of a query with every token it sees. */
  get flops(): number {
    const { chunks, heads, shape } = this.options;
    let pairs = 0;
    for (const { position, tokens } of chunks) pairs += tokens * position + (tokens * (tokens + 1)) / 2;
    return 4 * pairs * shape.headDim * heads;
  }

  /** Reads the output as f32 [rows][heads * headDim]. @throws Error where memory behind it was written. */
  async readOutput(): Promise<Float32Array<ArrayBuffer>> {
    const content = await this.output.read();
    return this.options.output === "f16"
      ? Float32Array.from(new Uint16Array(content), halfToFloat)
      : new Float32Array(content);
  }

  #page(slot: number, block: number): KvPageValues {
    const page = this.#table[slot * this.maxPages + block] as number;
    let values = this.#decoded.get(page);
    if (values === undefined) {
      const { format, shape } = this.options;
      const words = this.#pageData[page] as Uint32Array;
      values = decodePage(
        format,
        shape,
        new Uint8Array(words.buffer as ArrayBuffer, words.byteOffset, words.byteLength),
      );
      this.#decoded.set(page, values);
    }
    return values;
  }

  /** f64 attention of one query head of one row of the batch. */
  reference(row: number, head: number): Float64Array {
    const { chunks, shape, heads } = this.options;
    const { headDim, kvHeads, blockTokens, residualTokens } = shape;
    let first = 0;
    const chunk = chunks.find(({ tokens }) => {
      if (row < first + tokens) return true;
      first += tokens;
      return false;
    }) as PrefillChunk;
    const position = chunk.position + row - first;
    const frontier = position - (position % residualTokens);
    const width = (heads + 2 * kvHeads) * headDim;
    const kvHead = Math.floor(head / (heads / kvHeads));
    const read = (plane: 0 | 1) => (token: number, channel: number) => {
      const at = kvHead * headDim + channel;
      if (token >= frontier) {
        const source = row - position + token;
        return halfToFloat(this.#rowData[(source * 2 + plane) * kvHeads * headDim + at] as number);
      }
      const page = this.#page(chunk.slot, Math.floor(token / blockTokens));
      const values = plane === 0 ? page.keys : page.values;
      return values[(token % blockTokens) * kvHeads * headDim + at] as number;
    };
    const at = row * width + head * headDim;
    const query = this.#qkvData.subarray(at, at + headDim);
    return attentionReference(query, position + 1, 1 / Math.sqrt(headDim), read(0), read(1));
  }

  destroy(): void {
    for (const buffer of [this.qkv, this.pages, this.kvRows, this.pageTable, this.output.buffer, ...this.#tiles]) {
      buffer.destroy();
    }
  }
}
