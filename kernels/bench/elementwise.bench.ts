/**
 * Norm, activation, embedding and sampling: `npx tsx kernels/bench/elementwise.bench.ts [hidden] [feedForward] [vocabulary]`.
 * Prints a JSON line each, with the share of the measured read roof that the bytes touched amount to.
 */
import {
  createEmbedding,
  createLinearWeight,
  createRmsNorm,
  createSampler,
  createSiluMul,
  createStorage,
  openGpu,
  SAMPLE_PARAMETER_BYTES,
  SAMPLE_RESULT_BYTES,
  uploadStorage,
  writeSampleParameters,
} from "../src/index.ts";
import { randomGgml } from "../src/testing/ggml-blocks.ts";
import { Random } from "../src/testing/random.ts";
import { readRoof } from "./roofs.ts";
import { timePass } from "./timing.ts";

const [hidden = 576, feedForward = 1536, vocabulary = 49152] = process.argv.slice(2).map(Number);
const gpu = await openGpu();
const random = new Random(1);
const roof = await readRoof(gpu);
console.log(JSON.stringify({ device: gpu.name, profile: gpu.profile, roofGbytes: Number(roof.toFixed(1)) }));

async function report(
  name: string,
  rows: number,
  bytes: number,
  encode: (pass: GPUComputePassEncoder) => void,
): Promise<void> {
  const { best, median } = await timePass(gpu, encode, 10);
  const gbytes = bytes / best / 1e3;
  const figures = { bestUs: Math.round(best), medianUs: Math.round(median), gbytes: Number(gbytes.toFixed(2)) };
  console.log(JSON.stringify({ name, rows, ...figures, roof: "bytes", share: Number((gbytes / roof).toFixed(3)) }));
}

const norm = await createRmsNorm(gpu, { hidden, epsilon: 1e-5 });
const silu = await createSiluMul(gpu, { width: feedForward });
const table = createLinearWeight(gpu, {
  label: "table",
  parts: [{ type: "Q8_0", rows: 1024, data: randomGgml(random, "Q8_0", 1024 * hidden) }],
  columns: hidden,
});
const embedding = await createEmbedding(gpu, { weight: table, hidden });
for (const rows of [1, 128]) {
  const input = uploadStorage(gpu, "input", random.normals(rows * Math.max(hidden, 2 * feedForward)));
  const output = createStorage(gpu, "output", rows * Math.max(hidden, feedForward) * 4);
  const weight = uploadStorage(gpu, "weight", random.normals(hidden));
  const boundNorm = norm.bind({ input, weight, output });
  await report("rms-norm", rows, rows * hidden * 12, (pass) => boundNorm.encode(pass, rows));
  const boundSilu = silu.bind({ gateUp: input, output });
  await report("silu-mul", rows, rows * feedForward * 12, (pass) => boundSilu.encode(pass, rows));
  const tokens = uploadStorage(
    gpu,
    "tokens",
    Uint32Array.from({ length: rows }, () => random.integer(0, 1023)),
  );
  const boundEmbedding = embedding.bind({ tokens, output });
  await report("embedding Q8_0", rows, rows * hidden * 5, (pass) => boundEmbedding.encode(pass, rows));
}
for (const rows of [1, 8]) {
  const logits = uploadStorage(gpu, "logits", random.normals(rows * vocabulary, 3));
  const output = createStorage(gpu, "output", rows * SAMPLE_RESULT_BYTES);
  const sampler = await createSampler(gpu, { vocabulary, maxRows: rows });
  for (const [name, temperature, topK, topP] of [
    ["sample greedy", 0, 0, 1],
    ["sample temperature", 0.8, 0, 1],
    ["sample top-k 40, top-p 0.95", 0.8, 40, 0.95],
  ] as const) {
    const view = new DataView(new ArrayBuffer(rows * SAMPLE_PARAMETER_BYTES));
    for (let row = 0; row < rows; row++) {
      writeSampleParameters(view, row, { temperature, topK, topP, seedLow: 1, seedHigh: 2, position: row });
    }
    const parameters = uploadStorage(gpu, "parameters", view);
    const bound = sampler.bind({ logits, parameters, output });
    await report(name, rows, rows * vocabulary * 4, (pass) => bound.encode(pass, rows));
  }
}
await gpu.close();
process.exit(0);
