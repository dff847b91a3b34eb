/** Random pages, residual windows and rows for decode attention alone, and its f64 reference over the same bytes. */
import { submitPass, uploadStorage } from "../buffers.ts";
import type { Gpu } from "../device.ts";
import { floatToHalf, halfToFloat } from "../half.ts";
import { attentionReference, ropeReference, throughHalf } from "../kv-attention.reference.ts";
import type { AttentionTemplate } from "../kv-attention-template.ts";
import { createDecodeAttention, type DecodeAttention, type DecodeTables } from "../kv-decode.ts";
import type { KvKernelOptions } from "../kv-kernels.ts";
import { kvPageLayout } from "../kv-layout.ts";
import { decodePage, type KvPageValues } from "../kv-page.ts";
import { createKvStepTables, type DecodeRow } from "../kv-steps.ts";
import { buildRopeTable, ropeFrequencies } from "../rope-table.ts";
import { createPoisoned, POISON_WORD, type PoisonedBuffer } from "./poison.ts";
import { Random } from "./random.ts";

const THETA = 10000;

export interface DecodeSetupOptions extends Omit<KvKernelOptions, "ropeTable" | "maxRows"> {
  readonly seed: number;
  /** Deviation of q. */
  readonly queryDeviation?: number;
}

/** A page with random codes; scales and zeros that put keys and values into about [-1.5, 1.5]. */
function randomPage({ format, shape }: DecodeSetupOptions, random: Random): Uint32Array {
  const layout = kvPageLayout(format, shape);
  const words = new Uint32Array(layout.page);
  const half = () => floatToHalf(random.normal());
  const codes = (from: number, to: number, bits: number) => {
    for (let i = from; i < to; i++) words[i] = bits === 16 ? (half() | (half() << 16)) >>> 0 : random.uint32();
  };
  const meta = (from: number, to: number, bits: number) => {
    for (let i = from; i < to; i++) {
      const low = random.uniform(-2.5, -1);
      const step = (random.uniform(1, 2.5) - low) / (2 ** bits - 1);
      // Now and then a constant group, or one with large values.
      const odd = random.uniform();
      const scale = odd < 0.05 ? 0 : odd < 0.07 ? 4 * step : step;
      words[i] = (floatToHalf(scale) | (floatToHalf(low) << 16)) >>> 0;
    }
  };
  for (let head = 0; head < shape.kvHeads; head++) {
    const at = head * layout.head;
    codes(at, at + layout.keyMeta, format.keyBits);
    meta(at + layout.keyMeta, at + layout.valueCodes, format.keyBits);
    codes(at + layout.valueCodes, at + layout.valueMeta, format.valueBits);
    meta(at + layout.valueMeta, at + layout.head, format.valueBits);
  }
  for (let i = layout.norms; i < layout.page; i++) {
    words[i] = (floatToHalf(random.uniform(0.5, 1.5)) | (floatToHalf(random.uniform(0.5, 1.5)) << 16)) >>> 0;
  }
  return words;
}

export class DecodeAttentionSetup {
  readonly gpu: Gpu;
  readonly options: DecodeSetupOptions;
  readonly attention: DecodeAttention;
  readonly output: PoisonedBuffer;
  readonly residual: PoisonedBuffer;
  readonly status: GPUBuffer;
  readonly #tables: DecodeTables;
  readonly #buffers: readonly GPUBuffer[];
  readonly #qkv: Float32Array;
  readonly #qkvBuffer: GPUBuffer;
  readonly #halves: Uint16Array<ArrayBuffer>;
  readonly #pages: readonly KvPageValues[];
  readonly #pageTable: Uint32Array;
  readonly #encode: (rows: readonly DecodeRow[], step: number) => void;

  private constructor(gpu: Gpu, options: DecodeSetupOptions, parts: Awaited<ReturnType<typeof prepare>>) {
    this.gpu = gpu;
    this.options = options;
    this.attention = parts.attention;
    this.output = parts.output;
    this.residual = parts.residual;
    this.status = parts.tables.status;
    this.#tables = parts.tables;
    this.#buffers = parts.buffers;
    this.#qkv = parts.qkv;
    this.#qkvBuffer = parts.qkvBuffer;
    this.#halves = parts.halves;
    this.#pages = parts.pages;
    this.#pageTable = parts.pageTable;
    this.#encode = parts.encode;
  }

  static async create(gpu: Gpu, options: DecodeSetupOptions): Promise<DecodeAttentionSetup> {
    return new DecodeAttentionSetup(gpu, options, await prepare(gpu, options));
  }

  /**
   * Runs one step; the slot's own q, k and v are row `slot` of what was drawn. Outputs and partials are poisoned before.
   * @param step what `rows` are behind of the step: their positions plus `step` are run.
   */
  async run(rows: readonly DecodeRow[], step = 0): Promise<Float32Array<ArrayBuffer>> {
    const { heads, shape, outputType } = this.options;
    const width = (heads + 2 * shape.kvHeads) * shape.headDim;
    this.output.reset();
    this.gpu.device.queue.writeBuffer(this.residual.buffer, 0, this.#halves);
    const { partials } = this.attention;
    this.gpu.device.queue.writeBuffer(partials, 0, new Uint32Array(partials.size / 4).fill(POISON_WORD));
    rows.forEach(({ slot }, row) => {
      const values = this.#qkv.slice(slot * width, (slot + 1) * width);
      this.gpu.device.queue.writeBuffer(this.#qkvBuffer, row * width * 4, values);
    });
    this.#encode(rows, step);
    const content = await this.output.read();
    const count = rows.length * heads * shape.headDim;
    if (outputType === "f16") return Float32Array.from(new Uint16Array(content, 0, count), halfToFloat);
    return new Float32Array(content).slice(0, count);
  }

  /** Runs a row whose q, k and v are given. */
  async runRaw(qkv: Float32Array<ArrayBuffer>, row: DecodeRow): Promise<void> {
    this.gpu.device.queue.writeBuffer(this.#qkvBuffer, 0, qkv);
    this.#encode([row], 0);
    await this.gpu.device.queue.onSubmittedWorkDone();
  }

  /** K (0) or V (1) of the new token of a row, after rotary embedding, as the residual must hold it. */
  newToken({ slot, position }: DecodeRow, plane: 0 | 1): Float32Array<ArrayBuffer> {
    const { heads, shape, ropeLayout } = this.options;
    const { headDim: d, kvHeads } = shape;
    const width = (heads + 2 * kvHeads) * d;
    const start = slot * width + (heads + plane * kvHeads) * d;
    const values = Float64Array.from(this.#qkv.subarray(start, start + kvHeads * d));
    for (let head = 0; head < kvHeads && plane === 0; head++) {
      ropeReference(values.subarray(head * d, (head + 1) * d), position, this.#frequencies, ropeLayout);
    }
    return throughHalf(values);
  }

  get #frequencies(): Float64Array {
    const { ropeDim, shape } = this.options;
    return ropeFrequencies({ ropeDim: ropeDim ?? shape.headDim, theta: THETA });
  }

  /** f64 attention of one head of a row. */
  reference(row: DecodeRow, head: number): Float64Array {
    const { heads, shape, ropeLayout, attentionScale, maxPagesPerSequence } = this.options;
    const { headDim: d, kvHeads, blockTokens, residualTokens } = shape;
    const kvHead = Math.floor(head / (heads / kvHeads));
    const width = (heads + 2 * kvHeads) * d;
    const { slot, position } = row;
    const last = position % residualTokens;
    const sealed = position - last;
    const start = slot * width + head * d;
    const query = Float64Array.from(this.#qkv.subarray(start, start + d));
    ropeReference(query, position, this.#frequencies, ropeLayout);
    const fresh = [this.newToken(row, 0), this.newToken(row, 1)] as const;
    const read = (plane: 0 | 1) => (token: number, channel: number) => {
      const at = kvHead * d + channel;
      if (token === position) return fresh[plane][at] as number;
      if (token >= sealed) {
        const index = ((slot * 2 + plane) * residualTokens + token - sealed) * kvHeads * d + at;
        return halfToFloat(this.#halves[index] as number);
      }
      const page = this.#pageTable[slot * maxPagesPerSequence + Math.floor(token / blockTokens)] as number;
      const values = this.#pages[page]?.[plane === 0 ? "keys" : "values"];
      return values?.[(token % blockTokens) * kvHeads * d + at] as number;
    };
    return attentionReference(query, position + 1, attentionScale ?? 1 / Math.sqrt(d), read(0), read(1));
  }

  destroy(): void {
    this.attention.destroy();
    for (const buffer of [...this.#buffers, ...Object.values(this.#tables)]) buffer.destroy();
  }
}

async function prepare(gpu: Gpu, options: DecodeSetupOptions) {
  const { format, shape, heads, maxDecodeRows, maxSlots, maxPagesPerSequence, maxPositions, seed } = options;
  const { headDim: d, kvHeads, residualTokens } = shape;
  const random = new Random(seed);
  const ropeTable = buildRopeTable({ ropeDim: options.ropeDim ?? d, theta: THETA, maxPositions });
  const kernelOptions = { ...options, maxRows: 0, ropeTable };
  const stepTables = createKvStepTables({ ...kernelOptions, tileRows: 1 });
  const count = maxSlots * maxPagesPerSequence;
  const words = Array.from({ length: count }, () => randomPage(options, random));
  const pageWords = kvPageLayout(format, shape).page;
  const all = new Uint32Array(count * pageWords);
  words.forEach((page, i) => {
    all.set(page, i * pageWords);
  });
  const pageTable = Uint32Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = random.integer(0, i);
    [pageTable[i], pageTable[j]] = [pageTable[j] as number, pageTable[i] as number];
  }
  const qkv = random.normals(maxSlots * (heads + 2 * kvHeads) * d);
  const width = (heads + 2 * kvHeads) * d;
  for (let i = 0; i < qkv.length; i++)
    if (i % width < heads * d) qkv[i] = (qkv[i] as number) * (options.queryDeviation ?? 1);
  const halves = Uint16Array.from(random.normals(maxSlots * 2 * residualTokens * kvHeads * d), floatToHalf);
  const tables: DecodeTables = {
    decodeRows: uploadStorage(gpu, "rows", stepTables.decodeRows),
    pageTable: uploadStorage(gpu, "page table", pageTable),
    ropeTable: uploadStorage(gpu, "rope", ropeTable),
    status: uploadStorage(gpu, "status", new Uint32Array(maxSlots)),
  };
  const template = { scale: options.attentionScale ?? 1 / Math.sqrt(d) } as AttentionTemplate;
  const attention = await createDecodeAttention(gpu, kernelOptions, template, tables);
  const output = createPoisoned(gpu, "output", maxDecodeRows * heads * d * (options.outputType === "f16" ? 2 : 4));
  const residual = createPoisoned(gpu, "residual", halves.byteLength);
  const pages = uploadStorage(gpu, "pages", all);
  const qkvBuffer = uploadStorage(gpu, "qkv", new Float32Array(maxDecodeRows * width));
  const bound = attention.bind({ qkv: qkvBuffer, pages, residual: residual.buffer, output: output.buffer });
  return {
    attention,
    output,
    residual,
    tables,
    buffers: [pages, qkvBuffer, output.buffer, residual.buffer],
    qkv,
    qkvBuffer,
    halves,
    pages: words.map((page) => decodePage(format, shape, new Uint8Array(page.buffer))),
    pageTable,
    encode(rows: readonly DecodeRow[], step: number) {
      const plan = stepTables.fillDecodeSteps(rows, step + 1).at(-1);
      if (plan === undefined) throw new Error("no plan");
      gpu.device.queue.writeBuffer(tables.decodeRows, 0, stepTables.decodeRows);
      submitPass(gpu, (pass) => bound.encode(pass, plan.attend));
    },
  };
}
