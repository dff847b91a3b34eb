/** Decode attention of one layer, with rotary embedding, the new token's K and V, and the merge of its splits. */

import { floatToHalf, halfToFloat } from "../../src/half.ts";
import {
  buildRopeTable,
  createKernel,
  createKvKernels,
  createStorage,
  decodePage,
  type Gpu,
  type KvFormat,
  type KvShape,
  kvFormat,
  pageBytes,
  readBuffer,
  submitPass,
  uploadStorage,
} from "../../src/index.ts";
import { attentionReference, ropeReference } from "../../src/kv-attention.reference.ts";
import { kvPageLayout } from "../../src/kv-layout.ts";
import { ropeFrequencies } from "../../src/rope-table.ts";
import { Random } from "../../src/testing/random.ts";
import type { CaseList, KernelCase, PreparedCase } from "../kernel-case.ts";

interface DecodeShape {
  readonly batch: number;
  readonly context: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Tokens of the residual window, with the new one. Default: that one alone. */
  readonly residual?: number;
  readonly format: string;
  readonly numerics?: "invariant" | "fast";
  readonly floor?: string;
}

const MHA = { batch: 64, context: 4096, heads: 32, kvHeads: 32, headDim: 128 };
const LONG = { batch: 1, context: 32768, heads: 32, kvHeads: 32, headDim: 128 };
const GQA = { batch: 64, context: 8192, heads: 32, kvHeads: 8, headDim: 128 };
const SMALL_GQA = { batch: 16, context: 4096, heads: 32, kvHeads: 8, headDim: 128 };
const SMOL = { batch: 64, context: 4096, heads: 9, kvHeads: 3, headDim: 64 };
const MQA = { batch: 64, context: 4096, heads: 71, kvHeads: 1, headDim: 64 };

const FULL: readonly DecodeShape[] = [
  { ...MHA, format: "kivi2", floor: "≥ 3.9 × peer" },
  { ...MHA, format: "kivi2", numerics: "fast", floor: "≥ 3.9 × peer" },
  { ...MHA, format: "kivi2r" },
  { ...MHA, format: "kivi4" },
  { ...MHA, format: "kivi-k4v2" },
  { ...MHA, format: "kivi-k2v4" },
  { ...MHA, format: "f16", floor: "≥ 0.9 × peer" },
  { ...LONG, format: "kivi2", floor: "≥ 3.3 × peer" },
  { ...LONG, format: "kivi2", numerics: "fast", floor: "≥ 3.3 × peer" },
  { ...LONG, format: "kivi2r" },
  { ...LONG, format: "kivi4" },
  { ...LONG, format: "f16" },
  { ...GQA, format: "kivi2", floor: "≥ 2 × peer" },
  { ...GQA, format: "kivi2r" },
  { ...GQA, format: "kivi4" },
  { ...GQA, format: "kivi-k4v2" },
  { ...GQA, format: "f16" },
  { ...SMALL_GQA, format: "kivi2", floor: "≥ 1.7 × peer" },
  { ...SMALL_GQA, format: "kivi2r" },
  { ...SMALL_GQA, format: "kivi4" },
  { ...SMOL, format: "kivi2", floor: "≥ 1 × peer" },
  { ...SMOL, format: "kivi2r", floor: "≥ 1 × peer" },
  { ...SMOL, batch: 16, format: "kivi2", floor: "≥ 1 × peer" },
  { ...MQA, format: "kivi2", floor: "≥ 1 × peer" },
  { ...MQA, batch: 16, format: "kivi2", floor: "≥ 1 × peer" },
  // The paper's workload: short contexts, half of the tokens still f16.
  { ...MHA, batch: 512, context: 128, residual: 100, format: "kivi2" },
  { ...GQA, batch: 512, context: 256, residual: 100, format: "kivi2" },
];

const TINY: readonly DecodeShape[] = [
  { batch: 2, context: 256, heads: 2, kvHeads: 1, headDim: 64, format: "kivi2r", residual: 3 },
  { batch: 1, context: 128, heads: 2, kvHeads: 1, headDim: 64, format: "f16", numerics: "fast" },
];

const BLOCK = 128;
const THETA = 10000;

/** Random codes, scales and zeros of keys and values near [-1.5, 1.5], norms near 1; made on the GPU. */
const FILL = `requires immediate_address_space;
@group(0) @binding(0) var<storage, read_write> pages: array<u32>;
struct Layout { words: u32, page: u32, head: u32, keyMeta: u32, valueCodes: u32, valueMeta: u32, norms: u32, keyBits: u32, valueBits: u32 }
var<immediate> p: Layout;
fn hash(x: u32) -> u32 {
  var v = x * 747796405u + 2891336453u;
  v = ((v >> ((v >> 28u) + 4u)) ^ v) * 277803737u;
  return (v >> 22u) ^ v;
}
fn halfBits(x: u32) -> u32 { return (x & 0x8fff8fffu) | 0x30003000u; }
@compute @workgroup_size(256) fn main(@builtin(global_invocation_id) id: vec3u, @builtin(num_workgroups) groups: vec3u) {
  for (var i = id.x; i < p.words; i += groups.x * 256u) {
    let x = hash(i ^ 0x5bd1e995u);
    let u = vec2f(f32(x & 0xffffu), f32(x >> 16u)) / 65536.0;
    let inPage = i % p.page;
    let r = inPage % p.head;
    let isKey = r < p.valueCodes;
    let bits = select(p.valueBits, p.keyBits, isKey);
    if (inPage >= p.norms) { pages[i] = pack2x16float(0.8 + 0.4 * u); continue; }
    if (bits == 16u) { pages[i] = halfBits(x); continue; }
    if (select(r < p.valueMeta, r < p.keyMeta, isKey)) { pages[i] = x; continue; }
    let levels = f32((1u << bits) - 1u);
    let step = (u.x * 1.5 + 0.75) / levels;
    pages[i] = pack2x16float(vec2f(step, -0.5 * levels * step + (u.y - 0.5) * 0.5));
  }
}`;

async function fillPages(gpu: Gpu, format: KvFormat, shape: KvShape, pages: GPUBuffer, count: number): Promise<void> {
  const layout = kvPageLayout(format, shape);
  const { page, head, keyMeta, valueCodes, valueMeta, norms } = layout;
  const kernel = await createKernel(gpu, {
    label: "random pages",
    code: FILL,
    bindings: ["read_write"],
    immediateBytes: 36,
  });
  const words = [count * page, page, head, keyMeta, valueCodes, valueMeta, norms, format.keyBits, format.valueBits];
  const bound = kernel.bind([pages]);
  submitPass(gpu, (pass) => bound.encode(pass, Uint32Array.from(words), [gpu.profile === "hardware" ? 4096 : 16]));
}

/** f64 attention of one head of one row over the stored bytes. */
async function headReference(gpu: Gpu, data: DecodeData, row: number, head: number): Promise<Float64Array> {
  const { shape, format, pages, table, maxPages, qkv, residual, position, heads } = data;
  const { headDim: d, kvHeads } = shape;
  const kvHead = Math.floor(head / (heads / kvHeads));
  const layout = kvPageLayout(format, shape);
  const bytes = pageBytes(format, shape);
  const keys: Float32Array[] = [];
  const values: Float32Array[] = [];
  const single = { ...shape, kvHeads: 1 };
  const window = shape.residualTokens;
  for (let block = 0; block < Math.floor(position / window) * (window / BLOCK); block++) {
    const at = (table[row * maxPages + block] as number) * bytes;
    const content = new Uint8Array(pageBytes(format, single));
    content.set(new Uint8Array(await readBuffer(gpu, pages, at + kvHead * layout.head * 4, layout.head * 4)));
    const norms = (layout.page - layout.norms) * 4;
    if (norms > 0) {
      content.set(new Uint8Array(await readBuffer(gpu, pages, at + layout.norms * 4, norms)), layout.head * 4);
    }
    const decoded = decodePage(format, single, content);
    for (let token = 0; token < BLOCK; token++) {
      keys.push(decoded.keys.subarray(token * d, (token + 1) * d));
      values.push(decoded.values.subarray(token * d, (token + 1) * d));
    }
  }
  // Before the new token, the window holds what was uploaded; the new one comes from qkv.
  const plane = kvHeads * d;
  const last = position % window;
  for (let token = 0; token < last; token++) {
    const half = (which: number) =>
      Float32Array.from({ length: d }, (_, c) =>
        halfToFloat(residual[((row * 2 + which) * window + token) * plane + kvHead * d + c] as number),
      );
    keys.push(half(0));
    values.push(half(1));
  }
  const frequencies = ropeFrequencies({ ropeDim: d, theta: THETA });
  const width = (heads + 2 * kvHeads) * d;
  const part = (start: number) => Float64Array.from(qkv.subarray(row * width + start, row * width + start + d));
  const query = part(head * d);
  const key = part((heads + kvHead) * d);
  ropeReference(query, position, frequencies, "half");
  ropeReference(key, position, frequencies, "half");
  keys.push(Float32Array.from(key, (x) => halfToFloat(floatToHalf(x))));
  values.push(Float32Array.from(part((heads + kvHeads + kvHead) * d), (x) => halfToFloat(floatToHalf(x))));
  const read = (rows: Float32Array[]) => (token: number, channel: number) => rows[token]?.[channel] as number;
  return attentionReference(query, keys.length, 1 / Math.sqrt(d), read(keys), read(values));
}

interface DecodeData {
  readonly format: KvFormat;
  readonly shape: KvShape;
  readonly heads: number;
  readonly position: number;
  readonly maxPages: number;
  readonly table: Uint32Array;
  readonly pages: GPUBuffer;
  readonly qkv: Float32Array;
  readonly residual: Uint16Array;
}

async function prepareDecode(gpu: Gpu, decode: DecodeShape): Promise<PreparedCase> {
  const { batch, context, heads, kvHeads, headDim, residual: window = 1, numerics = "invariant" } = decode;
  const format = kvFormat(decode.format);
  const shape = { layers: 1, kvHeads, headDim, blockTokens: BLOCK, residualTokens: BLOCK };
  const position = context + window - 1;
  const maxPages = Math.ceil((context + BLOCK) / BLOCK);
  const maxPositions = context + BLOCK;
  const kernels = await createKvKernels(gpu, {
    format,
    shape,
    heads,
    maxRows: 0,
    maxDecodeRows: batch,
    maxSlots: batch,
    maxPagesPerSequence: maxPages,
    maxPositions,
    ropeLayout: "half",
    ropeTable: buildRopeTable({ ropeDim: headDim, theta: THETA, maxPositions }),
    numerics,
  });
  const random = new Random(batch + context + heads);
  const count = batch * maxPages;
  // Where a binding cannot hold all pages, later rows read those of earlier ones again: gigabytes later, from memory.
  const most = Math.floor(gpu.device.limits.maxStorageBufferBindingSize / pageBytes(format, shape));
  const stored = Math.min(count, most);
  const pages = createStorage(gpu, "pages", stored * pageBytes(format, shape));
  await fillPages(gpu, format, shape, pages, stored);
  // Pages of a sequence lie anywhere.
  const table = Uint32Array.from({ length: count }, (_, i) => i % stored);
  for (let i = count - 1; i > 0; i--) {
    const j = random.integer(0, i);
    [table[i], table[j]] = [table[j] as number, table[i] as number];
  }
  for (let row = 0; row < batch; row++) {
    kernels.setPages(row, 0, table.subarray(row * maxPages, (row + 1) * maxPages));
  }
  const normals = new Random(1).normals(65536);
  const qkv = new Float32Array(batch * (heads + 2 * kvHeads) * headDim).map(
    () => normals[random.uint32() & 0xffff] as number,
  );
  const halves = Uint16Array.from(normals, floatToHalf);
  const residual = new Uint16Array(kernels.residualBytes / 2).map(() => halves[random.uint32() & 0xffff] as number);
  const buffers = {
    qkv: uploadStorage(gpu, "qkv", qkv),
    pages,
    residual: uploadStorage(gpu, "residual", residual),
    chunkKv: createStorage(gpu, "chunk", kernels.chunkKvBytes),
    output: createStorage(gpu, "output", batch * heads * headDim * 4),
  };
  const layer = kernels.bindLayer(buffers);
  const plan = kernels.prepareDecode(Array.from({ length: batch }, (_, slot) => ({ slot, position })));
  const data = { format, shape, heads, position, maxPages, table, pages, qkv, residual };
  return {
    encode: (pass) => layer.encodeDecode(pass, plan),
    poison() {
      const words = new Uint32Array(buffers.output.size / 4).fill(0x7fc0_dead);
      gpu.device.queue.writeBuffer(buffers.output, 0, words);
    },
    async check() {
      let error = 0;
      let norm = 0;
      for (const [row, head] of [
        [0, 0],
        [batch - 1, heads - 1],
      ] as const) {
        const want = await headReference(gpu, data, row, head);
        const at = (row * heads + head) * headDim * 4;
        const got = new Float32Array(await readBuffer(gpu, buffers.output, at, headDim * 4));
        want.forEach((value, channel) => {
          error += ((got[channel] as number) - value) ** 2;
          norm += value ** 2;
        });
      }
      return Math.sqrt(error / norm);
    },
    tolerance: 2e-3,
    destroy() {
      kernels.destroy();
      for (const buffer of Object.values(buffers)) buffer.destroy();
    },
  };
}

/** Decode attention over sealed pages and the residual window. */
export const decodeAttentionCases: CaseList = (size) =>
  (size === "full" ? FULL : TINY).map((decode) => {
    const { batch, context, heads, kvHeads, headDim, residual = 1, numerics = "invariant", floor, format } = decode;
    const shape = { layers: 1, kvHeads, headDim, blockTokens: BLOCK, residualTokens: BLOCK };
    const tokens = context + residual;
    const pages = (batch * context * pageBytes(kvFormat(format), shape)) / BLOCK;
    const window = batch * residual * 2 * kvHeads * headDim * 2;
    const rows = batch * ((heads + 2 * kvHeads) * headDim * 4 + heads * headDim * 4);
    return {
      kernel: "decode attention",
      shape: `${batch} × ${context}${residual > 1 ? ` + ${residual}` : ""}, ${heads}/${kvHeads}, d${headDim}`,
      kvFormat: format,
      variant: "split + merge",
      numerics,
      bytes: pages + window + rows,
      flops: 4 * batch * tokens * heads * headDim,
      roof: "bytes",
      ...(residual > 1 ? {} : { peer: `sdpa decode ${batch}x${context} ${heads}/${kvHeads} d${headDim}` }),
      ...(floor === undefined ? {} : { floor }),
      prepare: (gpu) => prepareDecode(gpu, decode),
    } satisfies KernelCase;
  });
