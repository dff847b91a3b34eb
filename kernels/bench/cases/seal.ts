/** Sealing: quantize and pack K and V of many sequences into pages. */
import {
  createStorage,
  decodePage,
  encodePage,
  type Gpu,
  halfToFloat,
  kvFormat,
  pageBytes,
  readBuffer,
  uploadStorage,
} from "../../src/index.ts";
import { createKvSeal, kvSealVariant } from "../../src/kv-seal.ts";
import type { CaseList, KernelCase, PreparedCase } from "../kernel-case.ts";
import { fillRandom, poisonBuffer, relativeError } from "./random-fill.ts";

interface SealSize {
  readonly sequences: number;
  readonly heads: number;
  readonly tokens: number;
  readonly headDim: number;
  readonly block: number;
}

const FULL: SealSize = { sequences: 16, heads: 32, tokens: 4096, headDim: 128, block: 128 };
const GQA: SealSize = { ...FULL, heads: 8 };
const TINY: SealSize = { sequences: 2, heads: 2, tokens: 64, headDim: 32, block: 32 };

/** The table of all blocks: first token in the source, slot, position, unused. */
function sealTable(size: SealSize): Uint32Array {
  const blocks = size.tokens / size.block;
  const table = new Uint32Array(size.sequences * blocks * 4);
  for (let entry = 0; entry < size.sequences * blocks; entry++) {
    const first = (entry % blocks) * size.block;
    table.set([first, Math.floor(entry / blocks), first], entry * 4);
  }
  return table;
}

async function prepareSeal(gpu: Gpu, name: string, size: SealSize): Promise<PreparedCase> {
  const { sequences, heads, tokens, headDim, block } = size;
  const format = kvFormat(name);
  const shape = { layers: 1, kvHeads: heads, headDim, blockTokens: block, residualTokens: block };
  const row = (heads * headDim) / 2;
  const maxPages = tokens / block;
  const blocks = sequences * maxPages;
  const strides = { tokenStride: 2 * row, planeStride: row, slotStride: tokens * 2 * row };
  const seal = await createKvSeal(gpu, { format, shape, maxPages, ...strides });
  const bytes = pageBytes(format, shape);
  const buffers = {
    source: createStorage(gpu, "source", sequences * tokens * 2 * row * 4),
    seals: uploadStorage(gpu, "seals", sealTable(size)),
    pageTable: uploadStorage(
      gpu,
      "pages",
      Uint32Array.from({ length: blocks }, (_, i) => blocks - 1 - i),
    ),
    pages: createStorage(gpu, "pages", blocks * bytes),
    status: uploadStorage(gpu, "status", new Uint32Array(sequences)),
  };
  await fillRandom(gpu, buffers.source, "halves");
  const bound = seal.bind(buffers);
  const readBlock = async (entry: number) => {
    const from = entry * block * 2 * row * 4;
    const halves = new Uint16Array(await readBuffer(gpu, buffers.source, from, block * 2 * row * 4));
    const plane = (which: number) =>
      Float32Array.from({ length: block * 2 * row }, (_, i) => {
        const token = Math.floor(i / (2 * row));
        return halfToFloat(halves[token * 4 * row + which * 2 * row + (i % (2 * row))] as number);
      });
    return { keys: plane(0), values: plane(1) };
  };
  return {
    encode: (pass) => bound.encode(pass, blocks),
    poison: () => poisonBuffer(gpu, buffers.pages),
    tolerance: 1e-3,
    /** Decoded pages against the decoded pages of the reference quantizer: codes of a token whose norm rounds otherwise may differ. */
    async check() {
      const errors: number[] = [];
      for (const entry of [0, blocks - 1]) {
        const page = new Uint8Array(await readBuffer(gpu, buffers.pages, (blocks - 1 - entry) * bytes, bytes));
        const want = decodePage(format, shape, encodePage(format, shape, await readBlock(entry)));
        const got = decodePage(format, shape, page);
        errors.push(relativeError(got.keys, want.keys), relativeError(got.values, want.values));
      }
      return Math.max(...errors);
    },
    destroy() {
      for (const buffer of Object.values(buffers)) buffer.destroy();
    },
  };
}

function sealCase(kvFormatName: string, size: SealSize, variant: string, floor?: string): KernelCase {
  const { sequences, heads, tokens, headDim, block } = size;
  const format = kvFormat(kvFormatName);
  const shape = { layers: 1, kvHeads: heads, headDim, blockTokens: block, residualTokens: block };
  // The floor is of f16 input, so that is what counts here; the pages written are a fifth of it more.
  return {
    kernel: "seal",
    shape: `${sequences} × ${tokens}, ${heads} heads, d${headDim}`,
    kvFormat: format.name,
    variant,
    numerics: "invariant",
    bytes: sequences * tokens * heads * headDim * 4,
    flops: 0,
    roof: "bytes",
    ...(floor === undefined ? {} : { floor }),
    async prepare(gpu) {
      const chosen = kvSealVariant(gpu, { format, shape });
      if (gpu.profile === "hardware" && chosen !== variant) throw new Error(`the device gets ${chosen}`);
      return prepareSeal(gpu, kvFormatName, size);
    },
  };
}

export const sealCases: CaseList = (size) =>
  size === "tiny"
    ? ["kivi2", "kivi4r"].map((name) => sealCase(name, TINY, "loops"))
    : [
        ...["kivi2", "kivi2r", "kivi4", "kivi4r"].map((name) => sealCase(name, FULL, "tiles", "≥ 1.5 TB/s")),
        sealCase("kivi2r", GQA, "tiles"),
      ];
