/** Checks of the kernels that matrices and packed halves choose: linear layers and attention. */
import { createStorage, readBuffer, submitPass, uploadStorage } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import { floatToHalf, halfToFloat } from "./half.ts";
import { decodeVariant } from "./kv-decode.ts";
import { kvFormat } from "./kv-format.ts";
import { createKvKernels, type KvKernelOptions } from "./kv-kernels.ts";
import { pageBytes } from "./kv-layout.ts";
import { linearReference } from "./linear.reference.ts";
import { createLinear, type LinearDescriptor } from "./linear.ts";
import { createLinearWeight, type LinearWeightPart } from "./linear-weight.ts";
import { buildRopeTable } from "./rope-table.ts";
import type { KernelCheck } from "./self-test.ts";

/** Smooth values without a pattern that a wrong index could keep. */
function values(count: number, size: number, phase: number): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: count }, (_, i) => size * Math.sin(i * i * 0.37 + i + phase));
}

/** ‖got − want‖ / ‖want‖; not below any bound where a value is not finite. */
function relativeError(got: ArrayLike<number>, want: ArrayLike<number>): number {
  let [error, norm] = [0, 0];
  for (let i = 0; i < want.length; i++) {
    error += ((got[i] as number) - (want[i] as number)) ** 2;
    norm += (want[i] as number) ** 2;
  }
  return Math.sqrt(error / norm);
}

function judge(what: string, got: ArrayLike<number>, want: ArrayLike<number>, most: number): string | undefined {
  const error = relativeError(got, want);
  return error <= most ? undefined : `${what}: relative error ${error}, at most ${most}`;
}

const COLUMNS = 64;
const OUTPUTS = 48;
const ROWS = 20;

/** Codes of every value; the scale of a block is 0.02. */
function weightPart(type: "F16" | "Q4_0"): LinearWeightPart {
  if (type === "F16") {
    const halves = Uint16Array.from(values(OUTPUTS * COLUMNS, 0.3, 1), floatToHalf);
    return { type, rows: OUTPUTS, data: new Uint8Array(halves.buffer) };
  }
  const data = Uint8Array.from({ length: ((OUTPUTS * COLUMNS) / 32) * 18 }, (_, i) => (i * 167 + (i >> 3)) & 255);
  const view = new DataView(data.buffer);
  for (let at = 0; at < data.length; at += 18) view.setUint16(at, floatToHalf(0.02), true);
  return { type, rows: OUTPUTS, data };
}

type LinearCase = Pick<LinearDescriptor, "phase"> & { readonly type: "F16" | "Q4_0" };

async function runLinear(gpu: Gpu, { phase, type }: LinearCase, dialect: "device" | "emulated") {
  const part = weightPart(type);
  const weight = createLinearWeight(gpu, { label: "self-test", parts: [part], columns: COLUMNS });
  const halves = Uint16Array.from(values(ROWS * COLUMNS, 1, 2), floatToHalf);
  const input = uploadStorage(gpu, "self-test", halves);
  const output = createStorage(gpu, "self-test", ROWS * OUTPUTS * 4);
  const linear = await createLinear(gpu, { weight, phase, maxRows: ROWS, accumulate: false, input: "f16", dialect });
  submitPass(gpu, (pass) => linear.bind({ input, output }).encode(pass, ROWS));
  const got = new Float32Array(await readBuffer(gpu, output));
  for (const buffer of [input, output, weight.codes, weight.scales]) buffer.destroy();
  const want = linearReference(Float32Array.from(halves, halfToFloat), ROWS, COLUMNS, [part]);
  return judge(`${phase} ${type}`, got, want, 1e-3);
}

/** @param dialect `emulated` for tests on drivers without matrices. */
export function linearCheck(dialect: "device" | "emulated"): KernelCheck {
  return {
    variant: "linear matrix",
    feature: "subgroupMatrix",
    async run(gpu) {
      const cases = (["F16", "Q4_0"] as const).flatMap((type) =>
        (["prefill", "decode"] as const).map((phase) => ({ type, phase })),
      );
      const faults = await Promise.all(cases.map((one) => runLinear(gpu, one, dialect)));
      return faults.find((fault) => fault !== undefined);
    },
  };
}

export const LINEAR_CHECK: KernelCheck = linearCheck("device");

const SHAPE = { layers: 1, kvHeads: 1, headDim: 64, blockTokens: 32, residualTokens: 32 };
const HEADS = 2;
const WIDTH = (HEADS + 2 * SHAPE.kvHeads) * SHAPE.headDim;
/** Two windows, then one and a part over them: sealed and f16 tokens meet in attention. */
const CHUNKS = [
  { slot: 0, position: 0, tokens: 64 },
  { slot: 0, position: 64, tokens: 40 },
] as const;

type Variants = Pick<KvKernelOptions, "prefillVariant" | "decodeVariant">;

interface AttentionRun {
  readonly prefill: Float32Array;
  readonly decode: Float32Array;
}

/** Prefills two chunks and decodes one token. */
async function attend(gpu: Gpu, format: string, variants: Variants): Promise<AttentionRun> {
  const maxPositions = 128;
  const kernels = await createKvKernels(gpu, {
    format: kvFormat(format),
    shape: SHAPE,
    heads: HEADS,
    maxRows: 64,
    maxDecodeRows: 1,
    maxSlots: 1,
    maxPagesPerSequence: 4,
    maxPositions,
    ropeLayout: "half",
    ropeTable: buildRopeTable({ ropeDim: SHAPE.headDim, theta: 10000, maxPositions }),
    ...variants,
  });
  const storage = (bytes: number) => createStorage(gpu, "self-test", bytes);
  const buffers = {
    qkv: storage(64 * WIDTH * 4),
    pages: storage(4 * pageBytes(kvFormat(format), SHAPE)),
    residual: storage(kernels.residualBytes),
    chunkKv: storage(kernels.chunkKvBytes),
    output: storage(64 * HEADS * SHAPE.headDim * 4),
  };
  kernels.setPages(0, 0, [2, 0, 3, 1]);
  const layer = kernels.bindLayer(buffers);
  const run = async (rows: number, position: number, encode: (pass: GPUComputePassEncoder) => void) => {
    gpu.device.queue.writeBuffer(buffers.qkv, 0, values(rows * WIDTH, 1.5, position));
    submitPass(gpu, encode);
    return new Float32Array(await readBuffer(gpu, buffers.output, 0, rows * HEADS * SHAPE.headDim * 4));
  };
  let prefill = new Float32Array();
  for (const chunk of CHUNKS) {
    const plan = kernels.preparePrefill([chunk]);
    prefill = await run(chunk.tokens, chunk.position, (pass) => layer.encodePrefill(pass, plan));
  }
  const plan = kernels.prepareDecode([{ slot: 0, position: 104 }]);
  const decode = await run(1, 104, (pass) => layer.encodeDecode(pass, plan));
  kernels.destroy();
  for (const buffer of Object.values(buffers)) buffer.destroy();
  return { prefill, decode };
}

const PLAIN: Variants = { prefillVariant: "loops", decodeVariant: "loops" };

/** Against the plain kernels, which every device runs; 2-bit codes, rotated. */
async function compareAttention(gpu: Gpu, part: keyof AttentionRun, variants: Variants): Promise<string | undefined> {
  const [got, want] = await Promise.all([
    attend(gpu, "kivi2r", { ...PLAIN, ...variants }),
    attend(gpu, "kivi2r", PLAIN),
  ]);
  return judge(part, got[part], want[part], 5e-3);
}

export const DECODE_ATTENTION_CHECK: KernelCheck = {
  variant: "decode attention packed",
  feature: "shaderF16",
  async run(gpu) {
    // Packed halves also need subgroups of 32; where the device has others, nothing chooses them.
    const chosen = decodeVariant(gpu, { format: kvFormat("kivi2r"), shape: SHAPE });
    return chosen === "packed" ? compareAttention(gpu, "decode", { decodeVariant: "packed" }) : undefined;
  },
};

export const PREFILL_ATTENTION_CHECK: KernelCheck = {
  variant: "prefill attention matrix",
  feature: "subgroupMatrix",
  run: (gpu) => compareAttention(gpu, "prefill", { prefillVariant: "matrix" }),
};
