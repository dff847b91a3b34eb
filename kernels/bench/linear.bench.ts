/**
 * Linear layers of one model: `npx tsx kernels/bench/linear.bench.ts [smollm2|llama-2-7b]`.
 *
 * Prints a JSON line for each shape and phase with its share of the device's measured roofs (multiply-adds for prefill,
 * bytes of weights for decode), then what all layers together allow in tokens a second, and the time of repacking.
 */
import {
  createLinear,
  createLinearWeight,
  createStorage,
  type GgmlType,
  ggmlByteLength,
  openGpu,
} from "../src/index.ts";
import { randomGgml } from "../src/testing/ggml-blocks.ts";
import { Random } from "../src/testing/random.ts";
import { multiplyAddRoof, readRoof } from "./roofs.ts";
import { timePass } from "./timing.ts";

interface Shape {
  readonly name: string;
  readonly type: GgmlType;
  readonly rows: number;
  readonly columns: number;
  /** How often the model has it. */
  readonly count: number;
}

const MODELS: Record<string, readonly Shape[]> = {
  smollm2: [
    { name: "qkv", type: "Q4_1", rows: 960, columns: 576, count: 30 },
    { name: "o", type: "Q4_1", rows: 576, columns: 576, count: 30 },
    { name: "gate|up", type: "Q4_1", rows: 3072, columns: 576, count: 30 },
    { name: "down", type: "Q4_1", rows: 576, columns: 1536, count: 30 },
    { name: "head", type: "Q8_0", rows: 49152, columns: 576, count: 1 },
  ],
  "llama-2-7b": [
    { name: "qkv", type: "Q4_0", rows: 12288, columns: 4096, count: 32 },
    { name: "o", type: "Q4_0", rows: 4096, columns: 4096, count: 32 },
    { name: "gate|up", type: "Q4_0", rows: 22016, columns: 4096, count: 32 },
    { name: "down", type: "Q4_0", rows: 4096, columns: 11008, count: 32 },
    { name: "head", type: "Q6_K", rows: 32000, columns: 4096, count: 1 },
  ],
};

/** Rows of a prefill chunk, and of decode steps. */
const RUNS = [
  { phase: "prefill", rows: 128 },
  { phase: "decode", rows: 1 },
  { phase: "decode", rows: 8 },
  { phase: "decode", rows: 64 },
] as const;

const shapes = MODELS[process.argv[2] ?? "smollm2"];
if (shapes === undefined) throw new RangeError(`unknown model; known: ${Object.keys(MODELS).join(", ")}`);
const gpu = await openGpu();
const print = (line: object) => console.log(JSON.stringify(line));
const roofs = { gflops: await multiplyAddRoof(gpu), gbytes: await readRoof(gpu) };
print({
  device: gpu.name,
  profile: gpu.profile,
  roofGflops: Math.round(roofs.gflops),
  roofGbytes: Math.round(roofs.gbytes),
});
const random = new Random(1);
const totals = RUNS.map(() => 0);
let repackSeconds = 0;
for (const shape of shapes) {
  const { name, type, rows: outputs, columns, count } = shape;
  const block = randomGgml(random, type, 256 * columns);
  const data = new Uint8Array(ggmlByteLength(type, outputs * columns));
  for (let at = 0; at < data.length; at += block.length) data.set(block.subarray(0, data.length - at), at);
  const start = performance.now();
  const weight = createLinearWeight(gpu, { label: name, parts: [{ type, rows: outputs, data }], columns });
  const repack = (performance.now() - start) / 1000;
  repackSeconds += repack * count;
  for (const [index, { phase, rows }] of RUNS.entries()) {
    // The head runs for one row of a prefill chunk only: it does not count there.
    if (phase === "prefill" && name === "head") continue;
    const linear = await createLinear(gpu, { weight, phase, maxRows: 128, accumulate: false });
    const bound = linear.bind({
      input: createStorage(gpu, "input", rows * columns * 4),
      output: createStorage(gpu, "output", rows * outputs * 4),
    });
    const { best, median } = await timePass(gpu, (pass) => bound.encode(pass, rows), 10);
    totals[index] = (totals[index] as number) + best * count;
    const gflops = (2 * rows * outputs * columns) / best / 1e3;
    const gbytes = weight.bytes / best / 1e3;
    const share = phase === "prefill" ? gflops / roofs.gflops : gbytes / roofs.gbytes;
    print({
      shape: `${name} ${type} ${outputs}x${columns}`,
      phase,
      rows,
      bestUs: Math.round(best),
      medianUs: Math.round(median),
      gflops: Number(gflops.toFixed(2)),
      gbytes: Number(gbytes.toFixed(2)),
      roof: phase === "prefill" ? "multiply-adds" : "weight bytes",
      share: Number(share.toFixed(3)),
    });
  }
  weight.destroy();
}
for (const [index, { phase, rows }] of RUNS.entries()) {
  const ms = (totals[index] as number) / 1000;
  print({ total: phase, rows, ms: Number(ms.toFixed(1)), tokensPerSecond: Number(((rows / ms) * 1000).toFixed(1)) });
}
print({ repackSeconds: Number(repackSeconds.toFixed(2)) });
await gpu.close();
process.exit(0);
