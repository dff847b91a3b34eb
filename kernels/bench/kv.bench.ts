/**
 * Times the KV kernels of one model step and prints JSON lines: `npx tsx kernels/bench/kv.bench.ts [format] [context]`.
 *
 * Default shape: SmolLM2-135M (30 layers, 9/3 heads, 64). `share` compares with a roof: on the software driver the time
 * that the multiply-adds of attention take at 12 GFLOP/s (what the linear layers reach there), on a GPU the bytes of
 * the sealed pages at BENCH_BANDWIDTH bytes a second (default 4.2e12).
 */
import { createStorage, submitPass } from "../src/buffers.ts";
import { openGpu } from "../src/device.ts";
import { DEFAULT_KV_FORMAT, kvFormat } from "../src/kv-format.ts";
import { createKvKernels } from "../src/kv-kernels.ts";
import { pageBytes } from "../src/kv-layout.ts";
import { buildRopeTable } from "../src/rope-table.ts";
import { Random } from "../src/testing/random.ts";

const [name = DEFAULT_KV_FORMAT, contextText = "1536", only = "write|seal|prefill|decode"] = process.argv.slice(2);
const context = Number(contextText);
const LAYERS = 30;
const HEADS = 9;
const CHUNK = 256;
const shape = { layers: 1, kvHeads: 3, headDim: 64, blockTokens: 128, residualTokens: 128 };
const format = kvFormat(name);

const gpu = await openGpu();
const maxPositions = context + CHUNK;
const blocks = Math.ceil(maxPositions / shape.blockTokens);
const kernels = await createKvKernels(gpu, {
  format,
  shape,
  heads: HEADS,
  maxRows: CHUNK,
  maxDecodeRows: 1,
  maxSlots: 1,
  maxPagesPerSequence: blocks,
  maxPositions,
  ropeLayout: "interleaved",
  ropeTable: buildRopeTable({ ropeDim: shape.headDim, theta: 10000, maxPositions }),
});
const qkvData = new Random(1).normals(CHUNK * (HEADS + 2 * shape.kvHeads) * shape.headDim);
const qkv = createStorage(gpu, "qkv", qkvData.byteLength);
gpu.device.queue.writeBuffer(qkv, 0, qkvData);
const layer = kernels.bindLayer({
  qkv,
  pages: createStorage(gpu, "pages", blocks * pageBytes(format, shape)),
  residual: createStorage(gpu, "residual", kernels.residualBytes),
  chunkKv: createStorage(gpu, "chunk", kernels.chunkKvBytes),
  output: createStorage(gpu, "output", CHUNK * HEADS * shape.headDim * 4),
});
kernels.setPages(
  0,
  0,
  Array.from({ length: blocks }, (_, i) => i),
);

/** Processor milliseconds of the last timing: on the software driver all cores' work, whatever else the machine does. */
let processorMs = 0;

async function time(encode: (pass: GPUComputePassEncoder) => void, repeats: number): Promise<number> {
  submitPass(gpu, encode);
  await gpu.device.queue.onSubmittedWorkDone();
  const times: number[] = [];
  const cpu = process.cpuUsage();
  for (let run = 0; run < 5; run++) {
    const start = performance.now();
    submitPass(gpu, (pass) => {
      for (let i = 0; i < repeats; i++) encode(pass);
    });
    await gpu.device.queue.onSubmittedWorkDone();
    times.push((performance.now() - start) / repeats);
  }
  const used = process.cpuUsage(cpu);
  processorMs = (used.user + used.system) / 1000 / (5 * repeats);
  times.sort((a, b) => a - b);
  return times[1] as number;
}

function report(what: string, milliseconds: number, flop: number, bytes: number, extra: object): void {
  const roof = gpu.profile === "software" ? flop / 12e9 : bytes / Number(process.env.BENCH_BANDWIDTH ?? 4.2e12);
  const share = Number(((roof * 1000) / milliseconds).toFixed(3));
  console.log(
    JSON.stringify({
      what,
      device: gpu.name,
      format: name,
      ms: Number(milliseconds.toFixed(4)),
      processorMs: Number(processorMs.toFixed(3)),
      share,
      ...extra,
    }),
  );
}

// Seal the whole context first, chunk by chunk.
const start = performance.now();
for (let position = 0; position < context; position += CHUNK) {
  const plan = kernels.preparePrefill([{ slot: 0, position, tokens: Math.min(CHUNK, context - position) }]);
  submitPass(gpu, (pass) => layer.encodePrefill(pass, plan));
}
await gpu.device.queue.onSubmittedWorkDone();
console.log(JSON.stringify({ what: "fill and compile", ms: Math.round(performance.now() - start) }));

const pairFlop = 4 * HEADS * shape.headDim;
if (only.includes("decode")) {
  const plan = kernels.prepareDecode([{ slot: 0, position: context + 64 }]);
  const ms = await time((pass) => layer.encodeDecode(pass, plan), 10);
  const bytes = (context * pageBytes(format, shape)) / shape.blockTokens;
  report("decode", ms, pairFlop * (context + 64), bytes, { context, msPerToken: Number((ms * LAYERS).toFixed(2)) });
}
if (only.includes("prefill")) {
  const position = context - (context % shape.residualTokens);
  const plan = kernels.preparePrefill([{ slot: 0, position, tokens: CHUNK }]);
  const ms = await time((pass) => layer.encodePrefill(pass, plan), 1);
  const bytes = (position * pageBytes(format, shape)) / shape.blockTokens;
  report("prefill", ms, pairFlop * (position + 100) * CHUNK, bytes, {
    position,
    rows: CHUNK,
    msPerToken: Number(((ms * LAYERS) / CHUNK).toFixed(3)),
  });
}
if (only.includes("seal")) {
  const plan = kernels.prepareSeal([{ slot: 0, position: 0 }]);
  const ms = await time((pass) => layer.encodeSeal(pass, plan), 10);
  const bytes = shape.residualTokens * 4 * shape.kvHeads * shape.headDim;
  report("seal", ms, 0, bytes, { tokens: shape.residualTokens, msPerToken: Number(((ms * LAYERS) / 128).toFixed(3)) });
}
await gpu.close();
process.exit(0);
