import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createStorage, readBuffer, submitPass, uploadStorage } from "./buffers.ts";
import { type Gpu, openGpu } from "./device.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { createKernel } from "./kernel.ts";
import { ropeReference } from "./kv-attention.reference.ts";
import { kvFormat } from "./kv-format.ts";
import { createKvKernels, KV_STATUS_KEY_NOT_FINITE, KV_STATUS_VALUE_NOT_FINITE } from "./kv-kernels.ts";
import { TO_HALF_WGSL } from "./kv-write.wgsl.ts";
import { buildRopeTable, ropeFrequencies } from "./rope-table.ts";
import { createPoisoned } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";

let gpu: Gpu;
beforeAll(async () => {
  gpu = await openGpu();
});
afterAll(() => gpu.close());

test("toHalf rounds like the host: every half, its neighbours, ties, subnormals, overflow", async () => {
  const floats: number[] = [];
  const bits = new Uint32Array(1);
  const value = new Float32Array(bits.buffer);
  for (let half = 0; half < 0x7c00; half++) {
    const middle = half === 0x7bff ? 65520 : (halfToFloat(half) + halfToFloat(half + 1)) / 2;
    value[0] = middle;
    const tie = bits[0] as number;
    for (const word of [tie - 1, tie, tie + 1]) {
      bits[0] = word;
      floats.push(half % 2 === 0 ? (value[0] as number) : -(value[0] as number));
    }
    floats.push(halfToFloat(half), -halfToFloat(half));
  }
  floats.push(1e-45, 1e30, -1e30, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 2 ** -25, 2 ** -26);
  const input = Float32Array.from(floats);
  const output = createStorage(gpu, "halves", input.byteLength);
  const kernel = await createKernel(gpu, {
    label: "toHalf",
    code: `@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
${TO_HALF_WGSL}
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3u) {
  if (id.x < arrayLength(&x)) { y[id.x] = toHalf(bitcast<f32>(x[id.x])); }
}`,
    bindings: ["read", "read_write"],
  });
  const bound = kernel.bind([uploadStorage(gpu, "floats", input), output]);
  submitPass(gpu, (pass) => bound.encode(pass, undefined, [Math.ceil(input.length / 64)]));
  const result = new Uint32Array(await readBuffer(gpu, output));
  for (const [i, x] of input.entries()) {
    if (result[i] !== floatToHalf(x)) throw new Error(`toHalf(${x}) is ${result[i]}, not ${floatToHalf(x)}`);
  }
});

describe.each(["interleaved", "half"] as const)("rope and write, %s", (ropeLayout) => {
  test.each(["prefill", "decode"] as const)("%s rows equal the f64 reference", async (phase) => {
    const random = seededRandom(`rope ${ropeLayout} ${phase}`);
    const headDim = random.pick([64, 80, 128]);
    const ropeDim = random.pick([headDim, headDim / 2]);
    const shape = { layers: 1, kvHeads: random.pick([1, 2]), headDim, blockTokens: 32, residualTokens: 32 };
    const heads = shape.kvHeads * random.pick([1, 3]);
    const [maxSlots, rows, maxPositions, theta] = [3, 40, 2048, 10000];
    const kernels = await createKvKernels(gpu, {
      format: kvFormat("f16"),
      shape,
      heads,
      maxRows: rows,
      maxDecodeRows: rows,
      maxSlots,
      maxPagesPerSequence: maxPositions / 32,
      maxPositions,
      ropeLayout,
      ropeDim,
      ropeTable: buildRopeTable({ ropeDim, theta, maxPositions }),
    });
    const width = (heads + 2 * shape.kvHeads) * headDim;
    const row = shape.kvHeads * headDim;
    const data = random.normals(rows * width, 3);
    const qkv = createPoisoned(gpu, "qkv", rows * width * 4);
    gpu.device.queue.writeBuffer(qkv.buffer, 0, data);
    const residual = createPoisoned(gpu, "residual", kernels.residualBytes);
    const chunkKv = createPoisoned(gpu, "chunk", kernels.chunkKvBytes);
    const output = createPoisoned(gpu, "output", rows * heads * headDim * 4);
    const pages = createPoisoned(gpu, "pages", 64 * shape.blockTokens * row * 4);
    const layer = kernels.bindLayer({
      qkv: qkv.buffer,
      pages: pages.buffer,
      residual: residual.buffer,
      chunkKv: chunkKv.buffer,
      output: output.buffer,
    });
    kernels.setPages(2, 30, [3]);
    const position = 30 * 32;
    // A chunk of one window and a bit; or decode rows of one slot at successive positions, each with its own bits.
    const positions = Array.from({ length: phase === "prefill" ? rows : 20 }, (_, i) => position + i);
    if (phase === "prefill") {
      const plan = kernels.preparePrefill([{ slot: 2, position, tokens: rows }]);
      submitPass(gpu, (pass) => layer.encodePrefill(pass, plan));
    } else {
      const plan = kernels.prepareDecode(positions.map((at) => ({ slot: 2, position: at })));
      submitPass(gpu, (pass) => layer.encodeDecode(pass, plan));
    }
    const turned = new Float32Array(await qkv.read());
    const window = new Uint16Array(await residual.read());
    const chunk = new Uint16Array(await chunkKv.read());
    const frequencies = ropeFrequencies({ ropeDim, theta });
    for (const [i, at] of positions.entries()) {
      const expected = Float64Array.from(data.subarray(i * width, (i + 1) * width));
      for (let head = 0; head < heads + shape.kvHeads; head++) {
        ropeReference(expected.subarray(head * headDim, (head + 1) * headDim), at, frequencies, ropeLayout);
      }
      for (let c = 0; c < heads * headDim; c++) {
        expect(Math.abs((turned[i * width + c] as number) - (expected[c] as number))).toBeLessThan(4e-6);
      }
      const kept = phase === "decode" || at >= position + 32;
      for (let c = 0; c < 2 * row; c++) {
        const wanted = expected[heads * headDim + c] as number;
        const plane = Math.floor(c / row);
        const inWindow = ((2 * 2 + plane) * 32 + (at % 32)) * row + (c % row);
        const stored = [];
        if (kept) stored.push(halfToFloat(window[inWindow] as number));
        if (phase === "prefill") stored.push(halfToFloat(chunk[i * 2 * row + c] as number));
        for (const x of stored) expect(Math.abs(x - wanted)).toBeLessThanOrEqual(Math.abs(wanted) / 2000 + 4e-6);
      }
    }
    expect(new Uint32Array(await readBuffer(gpu, kernels.status))).toEqual(new Uint32Array(maxSlots));
    kernels.destroy();
  });
});

test.each([
  ["K", Number.NaN, KV_STATUS_KEY_NOT_FINITE],
  ["K", 1e6, KV_STATUS_KEY_NOT_FINITE],
  ["V", Number.POSITIVE_INFINITY, KV_STATUS_VALUE_NOT_FINITE],
  ["V", -70000, KV_STATUS_VALUE_NOT_FINITE],
])("%s of %f is flagged for its slot only, and cleared", async (plane, bad, flag) => {
  const shape = { layers: 1, kvHeads: 1, headDim: 32, blockTokens: 32, residualTokens: 32 };
  const kernels = await createKvKernels(gpu, {
    format: kvFormat("kivi2"),
    shape,
    heads: 1,
    maxRows: 4,
    maxDecodeRows: 4,
    maxSlots: 4,
    maxPagesPerSequence: 1,
    maxPositions: 32,
    ropeLayout: "half",
    ropeTable: buildRopeTable({ ropeDim: 32, theta: 10000, maxPositions: 32 }),
  });
  const data = new Float32Array(4 * 96).fill(0.5);
  data[2 * 96 + (plane === "K" ? 40 : 70)] = bad;
  const bytes = Math.max(kernels.residualBytes, 1 << 14);
  const layer = kernels.bindLayer({
    qkv: uploadStorage(gpu, "qkv", data),
    pages: createStorage(gpu, "pages", bytes),
    residual: createStorage(gpu, "residual", bytes),
    chunkKv: createStorage(gpu, "chunk", bytes),
    output: createStorage(gpu, "output", bytes),
  });
  const plan = kernels.prepareDecode([0, 1, 2, 3].map((slot) => ({ slot, position: 5 })));
  submitPass(gpu, (pass) => layer.encodeDecode(pass, plan));
  expect([...new Uint32Array(await readBuffer(gpu, kernels.status))]).toEqual([0, 0, flag, 0]);
  kernels.clearStatus(2);
  expect([...new Uint32Array(await readBuffer(gpu, kernels.status))]).toEqual([0, 0, 0, 0]);
});

test("rope tables: linear and Llama 3.1 scaling, frequency factors", () => {
  const plain = ropeFrequencies({ ropeDim: 128, theta: 500000 });
  const linear = ropeFrequencies({ ropeDim: 128, theta: 500000, scaling: { type: "linear", factor: 4 } });
  expect(linear[10]).toBeCloseTo((plain[10] as number) / 4, 12);
  const scaling = {
    type: "llama3",
    factor: 8,
    lowFrequencyFactor: 1,
    highFrequencyFactor: 4,
    originalContext: 8192,
  } as const;
  const llama = ropeFrequencies({ ropeDim: 128, theta: 500000, scaling });
  expect(llama[0]).toBe(plain[0]);
  expect(llama[63]).toBeCloseTo((plain[63] as number) / 8, 12);
  // Wavelength between the two thresholds: a blend of both.
  const middle = plain.findIndex((f) => (2 * Math.PI) / f > 8192 / 4 && (2 * Math.PI) / f < 8192);
  expect(llama[middle]).toBeLessThan(plain[middle] as number);
  expect(llama[middle]).toBeGreaterThan((plain[middle] as number) / 8);
  const factors = new Array(64).fill(2);
  expect(ropeFrequencies({ ropeDim: 128, theta: 500000, frequencyFactors: factors })[5]).toBe((plain[5] as number) / 2);
  const table = buildRopeTable({ ropeDim: 4, theta: 10000, maxPositions: 1000 });
  expect(table[999 * 4]).toBeCloseTo(Math.cos(999), 6);
  expect(table[999 * 4 + 3]).toBeCloseTo(Math.sin(999 * 0.01), 6);
  expect(() => buildRopeTable({ ropeDim: 5, theta: 1, maxPositions: 1 })).toThrow(RangeError);
});
