/**
 * Runs sequences through one layer of the KV kernels and through the f64 reference: the same random q, k, v per
 * (sequence, position) on both sides, whatever order of chunks and batches the test chooses.
 */
import { createStorage, readBuffer, submitPass, uploadStorage } from "../buffers.ts";
import type { Gpu } from "../device.ts";
import { halfToFloat } from "../half.ts";
import { attentionReference, ropeReference, throughHalf } from "../kv-attention.reference.ts";
import { createKvKernels, type KvKernelOptions, type KvKernels, type KvLayer } from "../kv-kernels.ts";
import { pageBytes } from "../kv-layout.ts";
import { decodePage, type KvPageValues } from "../kv-page.ts";
import type { PrefillChunk } from "../kv-steps.ts";
import { buildRopeTable, ropeFrequencies } from "../rope-table.ts";
import { createPoisoned, type PoisonedBuffer } from "./poison.ts";
import { Random } from "./random.ts";

export interface KvSetup extends Omit<KvKernelOptions, "ropeTable"> {
  readonly theta: number;
  readonly pages: number;
  readonly seed: number;
  /** Spread of the logits: deviation of q. */
  readonly queryDeviation?: number;
}

/** One row's position and where its result went. */
export interface KvRow {
  readonly slot: number;
  readonly position: number;
}

export class KvSequences {
  readonly gpu: Gpu;
  readonly setup: KvSetup;
  readonly kernels: KvKernels;
  readonly layer: KvLayer;
  readonly pages: PoisonedBuffer;
  readonly residual: PoisonedBuffer;
  readonly chunkKv: PoisonedBuffer;
  readonly output: PoisonedBuffer;
  readonly #qkv: PoisonedBuffer;
  readonly #frequencies: Float64Array;
  /** Page of block i of a slot. */
  readonly #table: number[][] = [];
  #freePages: number[];
  /** Seed of a slot's tokens; equal names give equal rows. */
  readonly names: number[] = [];

  constructor(gpu: Gpu, setup: KvSetup, kernels: KvKernels) {
    this.gpu = gpu;
    this.setup = setup;
    this.kernels = kernels;
    const { shape, heads, maxRows, maxDecodeRows, format } = setup;
    const rows = Math.max(maxRows, maxDecodeRows);
    this.#qkv = createPoisoned(gpu, "qkv", rows * this.width * 4);
    this.pages = createPoisoned(gpu, "pages", setup.pages * pageBytes(format, shape));
    this.residual = createPoisoned(gpu, "residual", kernels.residualBytes);
    this.chunkKv = createPoisoned(gpu, "chunk kv", kernels.chunkKvBytes);
    this.output = createPoisoned(gpu, "output", rows * heads * shape.headDim * 4);
    this.#frequencies = ropeFrequencies({ ropeDim: setup.ropeDim ?? shape.headDim, theta: setup.theta });
    this.layer = kernels.bindLayer({
      qkv: this.#qkv.buffer,
      pages: this.pages.buffer,
      residual: this.residual.buffer,
      chunkKv: this.chunkKv.buffer,
      output: this.output.buffer,
    });
    const random = new Random(setup.seed);
    this.#freePages = Array.from({ length: setup.pages }, (_, i) => i).sort(() => random.uniform() - 0.5);
    for (let slot = 0; slot < setup.maxSlots; slot++) {
      this.#table.push([]);
      this.names.push(slot);
    }
  }

  static async create(gpu: Gpu, setup: KvSetup): Promise<KvSequences> {
    const ropeDim = setup.ropeDim ?? setup.shape.headDim;
    const ropeTable = buildRopeTable({ ropeDim, theta: setup.theta, maxPositions: setup.maxPositions });
    return new KvSequences(gpu, setup, await createKvKernels(gpu, { ...setup, ropeTable }));
  }

  get width(): number {
    const { heads, shape } = this.setup;
    return (heads + 2 * shape.kvHeads) * shape.headDim;
  }

  /** q | k | v of a row before rotary embedding: depends on the slot's name and the position only. */
  rowValues({ slot, position }: KvRow): Float32Array<ArrayBuffer> {
    const { heads, shape, seed, queryDeviation = 1 } = this.setup;
    const random = new Random(
      seed ^ Math.imul((this.names[slot] as number) + 1, 0x9e3779b1) ^ Math.imul(position + 1, 0x85ebca6b),
    );
    const values = random.normals(this.width);
    for (let i = 0; i < heads * shape.headDim; i++) values[i] = (values[i] as number) * queryDeviation;
    // Keys with uneven channels and an occasional tiny or large token, as real ones have.
    const scale = position === 0 ? 0.1 : random.uniform() < 0.05 ? 3 : 1;
    for (let i = 0; i < shape.kvHeads * shape.headDim; i++) {
      const at = heads * shape.headDim + i;
      values[at] = (values[at] as number) * scale * (i % 7 === 0 ? 4 : 1) + (i % 11 === 0 ? 2 : 0);
    }
    return values;
  }

  /** Gives the slot pages for blocks up to `tokens`. */
  reserve(slot: number, tokens: number): void {
    const table = this.#table[slot] as number[];
    const blocks = Math.floor(tokens / this.setup.shape.blockTokens);
    const added: number[] = [];
    while (table.length + added.length < blocks) {
      const page = this.#freePages.pop();
      if (page === undefined) throw new RangeError("the test has too few pages");
      added.push(page);
    }
    this.kernels.setPages(slot, table.length, added);
    table.push(...added);
  }

  /** Shares the first blocks of another slot's sequence, as a prefix hit does. */
  sharePrefix(slot: number, from: number, blocks: number): void {
    const shared = (this.#table[from] as number[]).slice(0, blocks);
    this.#table[slot] = shared;
    this.kernels.setPages(slot, 0, shared);
  }

  /** Starts a slot anew under a name. */
  restart(slot: number, name: number): void {
    this.#freePages.push(...(this.#table[slot] as number[]));
    this.#table[slot] = [];
    this.names[slot] = name;
  }

  page(slot: number, block: number): number {
    return this.#table[slot]?.[block] as number;
  }

  async prefill(chunks: readonly PrefillChunk[]): Promise<Float32Array<ArrayBuffer>> {
    const rows = chunks.flatMap(({ slot, position, tokens }) =>
      Array.from({ length: tokens }, (_, i) => ({ slot, position: position + i })),
    );
    for (const { slot, position, tokens } of chunks) this.reserve(slot, this.#frontier(position + tokens));
    this.#upload(rows);
    const plan = this.kernels.preparePrefill(chunks);
    submitPass(this.gpu, (pass) => this.layer.encodePrefill(pass, plan));
    return this.#result(rows.length);
  }

  /** One decode step, with sealing of the windows that it fills. */
  async decode(rows: readonly KvRow[]): Promise<Float32Array<ArrayBuffer>> {
    this.#upload(rows);
    const window = this.setup.shape.residualTokens;
    const full = rows.filter(({ position }) => (position + 1) % window === 0);
    for (const { slot, position } of full) this.reserve(slot, position + 1);
    const plan = this.kernels.prepareDecode(rows);
    const seals = this.kernels.prepareSeal(
      full.map(({ slot, position }) => ({ slot, position: position + 1 - window })),
    );
    submitPass(this.gpu, (pass) => {
      this.layer.encodeDecode(pass, plan);
      this.layer.encodeSeal(pass, seals);
    });
    return this.#result(rows.length);
  }

  /** Decode steps in one pass: row i of step s is of position `position + s`. Each step's output. */
  async decodeSteps(rows: readonly KvRow[], steps: number): Promise<Float32Array<ArrayBuffer>[]> {
    for (const { slot, position } of rows) this.reserve(slot, this.#frontier(position + steps));
    const plans = this.kernels.prepareDecodeSteps(rows, steps);
    const bytes = rows.length * this.width * 4;
    const inputs = plans.map((_, step) => {
      const values = rows.flatMap(({ slot, position }) => [...this.rowValues({ slot, position: position + step })]);
      return uploadStorage(this.gpu, "step input", Float32Array.from(values));
    });
    const outputs = plans.map(() => createStorage(this.gpu, "step output", this.output.buffer.size));
    const encoder = this.gpu.device.createCommandEncoder();
    for (const [step, { attend, seal }] of plans.entries()) {
      encoder.copyBufferToBuffer(inputs[step] as GPUBuffer, 0, this.#qkv.buffer, 0, bytes);
      const pass = encoder.beginComputePass();
      this.layer.encodeDecode(pass, attend);
      this.layer.encodeSeal(pass, seal);
      pass.end();
      const output = outputs[step] as GPUBuffer;
      encoder.copyBufferToBuffer(this.output.buffer, 0, output, 0, output.size);
    }
    this.gpu.device.queue.submit([encoder.finish()]);
    const results: Float32Array<ArrayBuffer>[] = [];
    for (const output of outputs) results.push(this.#rows(await readBuffer(this.gpu, output), rows.length));
    for (const buffer of [...inputs, ...outputs]) buffer.destroy();
    return results;
  }

  #frontier(tokens: number): number {
    return tokens - (tokens % this.setup.shape.residualTokens);
  }

  #upload(rows: readonly KvRow[]): void {
    this.output.reset();
    rows.forEach((row, i) => {
      this.gpu.device.queue.writeBuffer(this.#qkv.buffer, i * this.width * 4, this.rowValues(row));
    });
  }

  async #result(rows: number): Promise<Float32Array<ArrayBuffer>> {
    await this.#qkv.read();
    return this.#rows(await this.output.read(), rows);
  }

  #rows(content: ArrayBuffer, rows: number): Float32Array<ArrayBuffer> {
    const count = rows * this.setup.heads * this.setup.shape.headDim;
    if (this.setup.outputType === "f16") return Float32Array.from(new Uint16Array(content, 0, count), halfToFloat);
    return new Float32Array(content).slice(0, count);
  }

  /** K and V of a row as f16 values after rotary embedding (f64): [kvHeads * headDim] each. */
  halfKv(row: KvRow): { keys: Float32Array<ArrayBuffer>; values: Float32Array<ArrayBuffer> } {
    const { heads, shape } = this.setup;
    const { headDim, kvHeads } = shape;
    const all = this.rowValues(row);
    const keys = Float64Array.from(all.subarray(heads * headDim, (heads + kvHeads) * headDim));
    for (let head = 0; head < kvHeads; head++) {
      ropeReference(
        keys.subarray(head * headDim, (head + 1) * headDim),
        row.position,
        this.#frequencies,
        this.setup.ropeLayout,
      );
    }
    return { keys: throughHalf(keys), values: throughHalf(all.subarray((heads + kvHeads) * headDim)) };
  }

  /** A sealed page as the GPU wrote it. */
  async pageContent(slot: number, block: number): Promise<Uint8Array<ArrayBuffer>> {
    const bytes = pageBytes(this.setup.format, this.setup.shape);
    return new Uint8Array(await readBuffer(this.gpu, this.pages.buffer, this.page(slot, block) * bytes, bytes));
  }

  /** The f16 tokens of a row's window as the GPU wrote them: from the rows of the last prefill, or from the residual. */
  async #window({ slot, position }: KvRow, chunkRow: number | undefined): Promise<KvPageValues[]> {
    const { kvHeads, headDim, residualTokens } = this.setup.shape;
    const row = kvHeads * headDim;
    const first = position - this.#frontier(position);
    const halves = new Uint16Array(await (chunkRow === undefined ? this.residual : this.chunkKv).read());
    return Array.from({ length: first + 1 }, (_, i) => {
      const plane = (at: number) => Float32Array.from(halves.subarray(at * row, (at + 1) * row), halfToFloat);
      if (chunkRow !== undefined) {
        const at = (chunkRow - first + i) * 2;
        return { keys: plane(at), values: plane(at + 1) };
      }
      const at = slot * 2 * residualTokens + i;
      return { keys: plane(at), values: plane(at + residualTokens) };
    });
  }

  /**
   * f64 attention of a row over what the GPU stored: sealed pages and f16 window. [heads * headDim]
   * @param chunkRow the row's index in the prefill that was the last to run; undefined for a decode row.
   */
  async reference(row: KvRow, chunkRow?: number): Promise<Float64Array> {
    const { heads, shape, format } = this.setup;
    const { headDim, kvHeads, blockTokens } = shape;
    const frontier = this.#frontier(row.position);
    const sealed: KvPageValues[] = [];
    for (let block = 0; block < frontier / blockTokens; block++) {
      sealed.push(decodePage(format, shape, await this.pageContent(row.slot, block)));
    }
    const window = await this.#window(row, chunkRow);
    const output = new Float64Array(heads * headDim);
    const values = this.rowValues(row);
    for (let head = 0; head < heads; head++) {
      const query = Float64Array.from(values.subarray(head * headDim, (head + 1) * headDim));
      ropeReference(query, row.position, this.#frequencies, this.setup.ropeLayout);
      const kvHead = Math.floor(head / (heads / kvHeads));
      const read = (plane: "keys" | "values") => (token: number, channel: number) => {
        const at = kvHead * headDim + channel;
        if (token >= frontier) return window[token - frontier]?.[plane][at] as number;
        const page = sealed[Math.floor(token / blockTokens)] as KvPageValues;
        return page[plane][(token % blockTokens) * kvHeads * headDim + at] as number;
      };
      const scale = this.setup.attentionScale ?? 1 / Math.sqrt(headDim);
      output.set(attentionReference(query, row.position + 1, scale, read("keys"), read("values")), head * headDim);
    }
    return output;
  }

  destroy(): void {
    this.kernels.destroy();
    for (const { buffer } of [this.pages, this.residual, this.chunkKv, this.output, this.#qkv]) buffer.destroy();
  }
}
