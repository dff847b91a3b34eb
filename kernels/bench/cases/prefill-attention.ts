/** Prefill attention of one layer by products of matrices: new tokens over sealed ones and their own window. */
import { createKernel, type Gpu, kvFormat, pageBytes } from "../../src/index.ts";
import { prefillMatrixWgsl } from "../../src/kv-prefill-matrix.wgsl.ts";
import { planPrefillMatrix } from "../../src/kv-prefill-matrix-plan.ts";
import { PrefillAttentionSetup } from "../../src/testing/prefill-attention-setup.ts";
import { CaseUnsupportedError } from "../case-error.ts";
import type { CaseList, KernelCase, PreparedCase } from "../kernel-case.ts";

interface PrefillShape {
  readonly tokens: number;
  readonly cached: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly format: string;
  readonly window?: number;
  readonly floor?: string;
}

const LONG = { tokens: 4096, cached: 4096, heads: 32, kvHeads: 8, headDim: 128 };
const FIRST = { ...LONG, cached: 0 };
const MHA = { ...LONG, kvHeads: 32 };
const CHUNK = { ...LONG, tokens: 512 };
const SMOL = { tokens: 2048, cached: 2048, heads: 9, kvHeads: 3, headDim: 64 };
const FLOOR = "≥ 60 TFLOP/s";

const FULL: readonly PrefillShape[] = [
  { ...LONG, format: "kivi2r", floor: FLOOR },
  { ...LONG, format: "kivi2", floor: FLOOR },
  { ...LONG, format: "kivi4" },
  { ...LONG, format: "kivi4r" },
  { ...LONG, format: "kivi-k4v2" },
  { ...LONG, format: "kivi-k2v4" },
  { ...LONG, format: "f16" },
  { ...FIRST, format: "kivi2r" },
  { ...MHA, format: "kivi2r" },
  { ...MHA, format: "f16" },
  { ...CHUNK, format: "kivi2r" },
  { ...LONG, tokens: 37, format: "kivi2r" },
  { ...LONG, window: 32, format: "kivi2r" },
  { ...SMOL, format: "kivi2r" },
  { ...SMOL, format: "f16" },
];

const TINY: readonly PrefillShape[] = [
  { tokens: 37, cached: 64, heads: 2, kvHeads: 1, headDim: 32, window: 32, format: "kivi2r" },
];

const shapeOf = ({ kvHeads, headDim, window = 128 }: PrefillShape) => ({
  layers: 1,
  kvHeads,
  headDim,
  blockTokens: Math.min(128, window),
  residualTokens: window,
});

async function preparePrefill(gpu: Gpu, prefill: PrefillShape): Promise<PreparedCase> {
  const { tokens, cached, heads, headDim } = prefill;
  const shape = shapeOf(prefill);
  const format = kvFormat(prefill.format);
  const device = gpu.features.subgroupMatrix;
  if (!device && gpu.profile === "hardware") throw new CaseUnsupportedError("this device has no subgroup matrices");
  const dialect = device ? "device" : "emulated";
  const plan = planPrefillMatrix(shape, heads, dialect);
  if (plan === undefined) throw new CaseUnsupportedError(`no matrices for head size ${headDim}`);
  const output = "f16";
  const chunks = [{ slot: 0, position: cached, tokens }];
  const setup = new PrefillAttentionSetup(gpu, { format, shape, heads, chunks, output, seed: tokens + cached });
  const kernel = await createKernel(gpu, {
    label: `prefill attention ${format.name}`,
    code: prefillMatrixWgsl({
      format,
      shape,
      heads,
      maxPages: setup.maxPages,
      scale: 1 / Math.sqrt(headDim),
      plan,
      dialect,
      arithmetic: gpu.features.shaderF16 ? "f16" : "f32",
      output,
    }),
    bindings: ["read", "read", "read", "read", "read", "read_write"],
    immediateBytes: 8,
  });
  const tiles = setup.tiles(plan.tileRows);
  const { qkv, pages, kvRows, pageTable } = setup;
  const bound = kernel.bind([qkv, pages, kvRows, tiles.buffer, pageTable, setup.output.buffer]);
  const immediates = new Uint32Array([1, 0]);
  return {
    encode: (pass) => bound.encode(pass, immediates, [tiles.count, heads / plan.queryHeads]),
    poison: () => setup.output.reset(),
    async check() {
      const got = await setup.readOutput();
      let error = 0;
      let norm = 0;
      for (const [row, head] of [
        [0, 0],
        [tokens >> 1, heads - 1],
        [tokens - 1, 1],
      ] as const) {
        const at = (row * heads + head) * headDim;
        setup.reference(row, head).forEach((want, channel) => {
          error += ((got[at + channel] as number) - want) ** 2;
          norm += want ** 2;
        });
      }
      return Math.sqrt(error / norm);
    },
    tolerance: 2e-3,
    destroy: () => setup.destroy(),
  };
}

/** Prefill attention of one chunk. */
export const prefillAttentionCases: CaseList = (size) =>
  (size === "full" ? FULL : TINY).map((prefill) => {
    const { tokens, cached, heads, kvHeads, headDim, format, window = 128, floor } = prefill;
    const shape = shapeOf(prefill);
    const sealed = Math.floor((cached + tokens) / window) * window;
    const pages = (sealed * pageBytes(kvFormat(format), shape)) / shape.blockTokens;
    const rows = tokens * (heads * headDim * (4 + 2) + 2 * kvHeads * headDim * 2);
    return {
      kernel: "prefill attention",
      shape: `${tokens} on ${cached}, ${heads}/${kvHeads}, d${headDim}${window === 128 ? "" : `, window ${window}`}`,
      kvFormat: format,
      variant: "matrix",
      numerics: "invariant",
      bytes: pages + rows,
      flops: 4 * heads * headDim * (tokens * cached + (tokens * (tokens + 1)) / 2),
      roof: "matrix",
      peer: `sdpa prefill ${tokens}+${cached} ${heads}/${kvHeads} d${headDim}`,
      ...(floor === undefined ? {} : { floor }),
      prepare: (gpu) => preparePrefill(gpu, prefill),
    } satisfies KernelCase;
  });
