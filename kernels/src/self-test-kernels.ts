/** Checks of the variants that subgroups choose: norm, sampling, sealing; tiny cases against the references. */
import { createStorage, readBuffer, submitPass, uploadStorage } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { kvFormat } from "./kv-format.ts";
import { pageBytes } from "./kv-layout.ts";
import { encodePage } from "./kv-page.ts";
import { createKvSeal, kvSealVariant } from "./kv-seal.ts";
import { createRmsNorm, rmsNormReference } from "./rms-norm.ts";
import { logProbability, pcg4d, sampleDistribution } from "./sample.reference.ts";
import {
  createSampler,
  readSampleResult,
  SAMPLE_PARAMETER_BYTES,
  SAMPLE_RESULT_BYTES,
  type SampleParameters,
  writeSampleParameters,
} from "./sample.ts";
import type { KernelCheck } from "./self-test.ts";

/** Smooth values without a pattern that a wrong index could keep. */
function values(count: number, size: number): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: count }, (_, i) => size * Math.sin(i * i * 0.37 + i));
}

export const NORM_CHECK: KernelCheck = {
  variant: "rms-norm registers",
  feature: "subgroups",
  async run(gpu) {
    const hidden = 520;
    const [input, weight] = [values(2 * hidden, 3), values(hidden, 1)];
    const norm = await createRmsNorm(gpu, { hidden, epsilon: 1e-5, variant: "registers" });
    const buffers = {
      input: uploadStorage(gpu, "self-test", input),
      weight: uploadStorage(gpu, "self-test", weight),
      output: createStorage(gpu, "self-test", input.byteLength),
    };
    submitPass(gpu, (pass) => norm.bind(buffers).encode(pass, 2));
    const got = new Float32Array(await readBuffer(gpu, buffers.output));
    for (const buffer of Object.values(buffers)) buffer.destroy();
    const want = rmsNormReference(input, weight, [0, 1], 1e-5);
    const wrong = want.findIndex((value, i) => !(Math.abs((got[i] as number) - value) < 1e-4));
    return wrong < 0 ? undefined : `element ${wrong}: ${got[wrong]}, must be ${want[wrong]}`;
  },
};

const VOCABULARY = 1000;

function sampleRequests(): SampleParameters[] {
  const limits: readonly (readonly [number, number, number])[] = [
    [0, 0, 1],
    [0.8, 0, 1],
    [0.8, 5, 1],
    [1.2, 40, 0.9],
    [1, 0, 0.95],
    [2, 0, 0.9],
  ];
  return limits.map(([temperature, topK, topP], row) => {
    return { temperature, topK, topP, seedLow: 7 * row + 1, seedHigh: row, position: 11 * row };
  });
}

/** @returns what is wrong with a drawn token, if anything. */
function judgeSample(logits: Float32Array, request: SampleParameters, token: number, logprob: number) {
  const { kept } = sampleDistribution(logits, request);
  const index = kept.findIndex((entry) => entry.token === token);
  if (index < 0) return `token ${token} is not among those kept`;
  const place = request.temperature === 0 ? 0 : pcg4d(request.seedLow, request.seedHigh, request.position) / 2 ** 32;
  const before = kept.slice(0, index).reduce((sum, { probability }) => sum + probability, 0);
  const after = before + (kept[index]?.probability ?? 0);
  if (place < before - 1e-4 || place > after + 1e-4) return `token ${token} covers ${before} … ${after}, not ${place}`;
  const wanted = logProbability(logits, token);
  return Math.abs(logprob - wanted) < 1e-3 ? undefined : `log probability ${logprob}, must be ${wanted}`;
}

export const SAMPLE_CHECK: KernelCheck = {
  variant: "sample slices",
  feature: "subgroups",
  async run(gpu) {
    const requests = sampleRequests();
    const rows = requests.length;
    const logits = values(rows * VOCABULARY, 6);
    const view = new DataView(new ArrayBuffer(rows * SAMPLE_PARAMETER_BYTES));
    for (const [row, request] of requests.entries()) writeSampleParameters(view, row, request);
    const sampler = await createSampler(gpu, { vocabulary: VOCABULARY, maxRows: rows, variant: "slices" });
    const buffers = {
      logits: uploadStorage(gpu, "self-test", logits),
      parameters: uploadStorage(gpu, "self-test", view),
      output: createStorage(gpu, "self-test", rows * SAMPLE_RESULT_BYTES),
    };
    submitPass(gpu, (pass) => sampler.bind(buffers).encode(pass, rows));
    const results = new DataView(await readBuffer(gpu, buffers.output));
    for (const buffer of Object.values(buffers)) buffer.destroy();
    for (const [row, request] of requests.entries()) {
      const { token, logprob } = readSampleResult(results, row);
      const mine = logits.slice(row * VOCABULARY, (row + 1) * VOCABULARY);
      const fault = judgeSample(mine, request, token, logprob);
      if (fault !== undefined) return `row ${row}: ${fault}`;
    }
    return undefined;
  },
};

const SEAL_SHAPE = { layers: 1, kvHeads: 2, headDim: 64, blockTokens: 32, residualTokens: 32 };

/** Groups of 32 values half-way between codes, whose scales are odd: quotients that are not exact show. */
function ties(count: number): number[] {
  return Array.from({ length: count }, (_, i) => {
    const scale = 2 * (i >> 5) + 3;
    return (scale * ((i * 5) % 7)) / 2;
  });
}

async function sealOnce(gpu: Gpu, name: string, halves: Uint16Array<ArrayBuffer>): Promise<Uint8Array> {
  const format = kvFormat(name);
  const row = (SEAL_SHAPE.kvHeads * SEAL_SHAPE.headDim) / 2;
  const plane = row * SEAL_SHAPE.blockTokens;
  const strides = { tokenStride: row, planeStride: plane, slotStride: 2 * plane };
  const seal = await createKvSeal(gpu, { format, shape: SEAL_SHAPE, maxPages: 1, ...strides });
  const buffers = {
    source: uploadStorage(gpu, "self-test", halves),
    seals: uploadStorage(gpu, "self-test", new Uint32Array(4)),
    pageTable: uploadStorage(gpu, "self-test", new Uint32Array(1)),
    pages: createStorage(gpu, "self-test", pageBytes(format, SEAL_SHAPE)),
    status: uploadStorage(gpu, "self-test", new Uint32Array(1)),
  };
  submitPass(gpu, (pass) => seal.bind(buffers).encode(pass, 1));
  const page = new Uint8Array(await readBuffer(gpu, buffers.pages));
  for (const buffer of Object.values(buffers)) buffer.destroy();
  return page;
}

export const SEAL_CHECK: KernelCheck = {
  variant: "seal tiles",
  feature: "subgroups",
  async run(gpu) {
    const count = SEAL_SHAPE.kvHeads * SEAL_SHAPE.headDim * SEAL_SHAPE.blockTokens;
    const halves = Uint16Array.from([...values(count, 4), ...ties(count)], floatToHalf);
    const floats = Float32Array.from(halves, halfToFloat);
    for (const name of ["kivi2r", "kivi4"]) {
      const format = kvFormat(name);
      if (kvSealVariant(gpu, { format, shape: SEAL_SHAPE }) === "loops") return undefined;
      const got = await sealOnce(gpu, name, halves);
      const want = encodePage(format, SEAL_SHAPE, { keys: floats.slice(0, count), values: floats.slice(count) });
      const wrong = want.reduce((sum, byte, i) => sum + (byte === got[i] ? 0 : 1), 0);
      // Squares summed in another order may move a token's norm by one unit, and with it its codes.
      if (wrong > (format.rotated ? want.length / 50 : 0)) return `${name}: ${wrong} of ${want.length} bytes`;
    }
    return undefined;
  },
};
