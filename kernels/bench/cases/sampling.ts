/** Sampling: from logits to tokens and their log probabilities. */
import {
  createSampler,
  createStorage,
  type Gpu,
  readBuffer,
  readSampleResult,
  SAMPLE_PARAMETER_BYTES,
  SAMPLE_RESULT_BYTES,
  type SampleParameters,
  uploadStorage,
  writeSampleParameters,
} from "../../src/index.ts";
import { logProbability, pcg4d, sampleDistribution } from "../../src/sample.reference.ts";
import type { CaseList, KernelCase, PreparedCase } from "../kernel-case.ts";
import { fillRandom, poisonBuffer } from "./random-fill.ts";

type Limits = Pick<SampleParameters, "temperature" | "topK" | "topP">;

const WAYS: Readonly<Record<string, Limits>> = {
  greedy: { temperature: 0, topK: 0, topP: 1 },
  temperature: { temperature: 0.8, topK: 0, topP: 1 },
  "top-k 40, top-p 0.95": { temperature: 0.8, topK: 40, topP: 0.95 },
  "top-p 0.95": { temperature: 0.8, topK: 0, topP: 0.95 },
};

function requestOf(limits: Limits, row: number): SampleParameters {
  return { ...limits, seedLow: 1, seedHigh: 2, position: row };
}

/**
 * How wrong a row's answer is: infinite for a token that may not be drawn or is not at the random number's place, else the
 * difference of the log probability.
 */
function judge(logits: Float32Array, request: SampleParameters, answer: { token: number; logprob: number }): number {
  const { kept } = sampleDistribution(logits, request);
  const index = kept.findIndex(({ token }) => token === answer.token);
  const place = request.temperature === 0 ? 0 : pcg4d(request.seedLow, request.seedHigh, request.position) / 2 ** 32;
  const before = kept.slice(0, Math.max(index, 0)).reduce((sum, { probability }) => sum + probability, 0);
  const after = before + (kept[index]?.probability ?? 0);
  if (index < 0 || place < before - 1e-4 || place > after + 1e-4) return Number.POSITIVE_INFINITY;
  return Math.abs(answer.logprob - logProbability(logits, answer.token));
}

interface SampleSize {
  readonly rows: number;
  readonly vocabulary: number;
  /** Logits as a model's; otherwise normal with deviation 3, where top-p keeps thousands. */
  readonly ranked?: boolean;
}

async function prepareSampling(gpu: Gpu, size: SampleSize, limits: Limits): Promise<PreparedCase> {
  const { rows, vocabulary, ranked = false } = size;
  const sampler = await createSampler(gpu, { vocabulary, maxRows: rows });
  const view = new DataView(new ArrayBuffer(rows * SAMPLE_PARAMETER_BYTES));
  for (let row = 0; row < rows; row++) writeSampleParameters(view, row, requestOf(limits, row));
  const buffers = {
    logits: createStorage(gpu, "logits", rows * vocabulary * 4),
    parameters: uploadStorage(gpu, "parameters", view),
    output: createStorage(gpu, "output", rows * SAMPLE_RESULT_BYTES),
  };
  await fillRandom(gpu, buffers.logits, ranked ? "ranked" : "floats", 3);
  const bound = sampler.bind(buffers);
  return {
    encode: (pass) => bound.encode(pass, rows),
    poison: () => poisonBuffer(gpu, buffers.output),
    tolerance: 1e-3,
    async check() {
      const results = new DataView(await readBuffer(gpu, buffers.output));
      const errors: number[] = [];
      for (const row of new Set([0, Math.floor(rows / 2), rows - 1])) {
        const at = row * vocabulary * 4;
        const logits = new Float32Array(await readBuffer(gpu, buffers.logits, at, vocabulary * 4));
        errors.push(judge(logits, requestOf(limits, row), readSampleResult(results, row)));
      }
      return Math.max(...errors);
    },
    destroy() {
      for (const buffer of Object.values(buffers)) buffer.destroy();
    },
  };
}

function sampleCase(way: string, size: SampleSize, more: Partial<KernelCase> = {}): KernelCase {
  const { rows, vocabulary, ranked = false } = size;
  return {
    kernel: `sampling, ${way}`,
    shape: `${rows} × ${vocabulary}${ranked ? ", ranked logits" : ""}`,
    variant: "slices",
    numerics: "invariant",
    bytes: rows * vocabulary * 4,
    flops: 0,
    roof: "bytes",
    ...more,
    prepare: (gpu) => prepareSampling(gpu, size, WAYS[way] as Limits),
  };
}

export const samplingCases: CaseList = (size) => {
  if (size === "tiny")
    return Object.keys(WAYS).map((way) => sampleCase(way, { rows: 2, vocabulary: 500 }, { variant: "rows" }));
  const floor = "≤ 60 µs";
  const large = { rows: 64, vocabulary: 128256 };
  const many = { rows: 1000, vocabulary: 32000 };
  return [
    sampleCase("greedy", large, { floor, peer: "sample greedy 64x128256" }),
    sampleCase("temperature", large, { floor, peer: "sample temperature 64x128256" }),
    sampleCase("top-k 40, top-p 0.95", large, { floor, peer: "sample top-k 64x128256" }),
    sampleCase("top-p 0.95", { ...large, ranked: true }, { floor, peer: "sample top-p 64x128256" }),
    sampleCase("top-p 0.95", large, { floor, peer: "sample top-p 64x128256" }),
    sampleCase("greedy", many),
    sampleCase("temperature", many),
    sampleCase("greedy", { rows: 1, vocabulary: 128256 }),
  ];
};
