import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { GGMLQuantizationType } from "@huggingface/gguf";
import {
  dequantizeGgml,
  type GgmlType,
  type Gpu,
  ggmlBlock,
  ggmlByteLength,
  halfToFloat,
  openGpu,
} from "@kivimesh/kernels";
import { afterAll, beforeAll, expect, test } from "vitest";
import { byteLetters } from "../model/byte-tokenizer.ts";
import { llamaTensors } from "../model/llama-tensors.ts";
import { loadModel } from "../model/load-model.ts";
import type { ModelConfig } from "../model/model-config.ts";
import { type GgufTensorData, ggufBytes } from "../model/testing/gguf-writer.ts";
import { temporaryFolder } from "../model/testing/temporary-folder.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { decodeGreedy, pages, prefill, promptTokens } from "./testing/sequences.ts";

/** The smallest widths that the formats with blocks of 256 allow. */
const CONFIG: ModelConfig = {
  architecture: "llama",
  layers: 1,
  hidden: 256,
  feedForward: 256,
  heads: 4,
  kvHeads: 2,
  headDim: 64,
  vocabulary: 288,
  contextTokens: 512,
  normEpsilon: 1e-5,
  rope: { theta: 10_000, dimensions: 64, layout: "interleaved" },
  tiedEmbedding: true,
};

const METADATA = {
  "general.architecture": "llama",
  "llama.block_count": 1,
  "llama.context_length": 512,
  "llama.embedding_length": 256,
  "llama.feed_forward_length": 256,
  "llama.attention.head_count": 4,
  "llama.attention.head_count_kv": 2,
  "llama.attention.layer_norm_rms_epsilon": 0.00001,
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.pre": "gpt-2",
  "tokenizer.ggml.tokens": [...byteLetters(), ...Array.from({ length: 32 }, (_, index) => `w${index}`)],
  "tokenizer.ggml.merges": ["a b"],
};

/** Where a block keeps its f16 scales, and values that make weights of about 1/16. */
const SCALES: Readonly<Partial<Record<GgmlType, readonly (readonly [number, number])[]>>> = {
  Q4_0: [[0, 0.015]],
  Q4_1: [
    [0, 0.015],
    [2, -0.11],
  ],
  Q5_0: [[0, 0.007]],
  Q5_1: [
    [0, 0.007],
    [2, -0.11],
  ],
  Q8_0: [[0, 0.001]],
  Q4_K: [
    [0, 0.0005],
    [2, 0.004],
  ],
  Q5_K: [
    [0, 0.00025],
    [2, 0.004],
  ],
  Q6_K: [[208, 0.00004]],
};

/** The largest half below `value`. */
function halfBits(value: number): number {
  let bits = value < 0 ? 0x8000 : 0;
  while (Math.abs(halfToFloat(bits + 1)) <= Math.abs(value)) bits++;
  return bits;
}

function randomTensor(type: GgmlType, elements: number, seed: number): Uint8Array {
  const words = promptTokens(elements, 65_536, seed);
  const scales = SCALES[type];
  if (scales === undefined) {
    const values = Float32Array.from(words, (word) => (word / 32_768 - 1) / 8);
    if (type === "F32") return new Uint8Array(values.buffer);
    // The upper half of an f32 is its bfloat16; as f16 such bits stand for other small numbers, cut to below 1/8.
    const upper = new Uint32Array(values.buffer).map((bits) => bits >>> 16);
    const halves = Uint16Array.from(upper, (bits, i) =>
      type === "BF16" ? bits : 0x2000 + ((words[i] as number) & 0x8fff),
    );
    return new Uint8Array(halves.buffer);
  }
  const bytes = new Uint8Array(ggmlByteLength(type, elements));
  bytes.forEach((_, index) => {
    bytes[index] = (words[index % words.length] as number) >> 8;
  });
  const view = new DataView(bytes.buffer);
  for (let block = 0; block < bytes.length; block += ggmlBlock(type).bytes) {
    for (const [offset, value] of scales) view.setUint16(block + offset, halfBits(value), true);
  }
  return bytes;
}

type TypeOf = (name: string) => GgmlType;

/** The same weights twice: as the given types, and decoded to f32. */
function tensorPair(typeOf: TypeOf): { packed: GgufTensorData[]; decoded: GgufTensorData[] } {
  const packed: GgufTensorData[] = [];
  const decoded: GgufTensorData[] = [];
  for (const [index, { name, rows, columns }] of llamaTensors(CONFIG).entries()) {
    const type = rows === 1 ? "F32" : typeOf(name);
    const ones = new Uint8Array(new Float32Array(columns).fill(1).buffer);
    const data = rows === 1 ? ones : randomTensor(type, rows * columns, index + 1);
    const values = dequantizeGgml(type, data, rows * columns);
    packed.push({ name, rows, columns, type: GGMLQuantizationType[type], data });
    decoded.push({ name, rows, columns, type: GGMLQuantizationType.F32, data: new Uint8Array(values.buffer) });
  }
  return { packed, decoded };
}

let gpu: Gpu;
beforeAll(async () => {
  gpu = await openGpu();
});
afterAll(() => gpu.close());

async function answer(tensors: readonly GgufTensorData[]) {
  const path = join(temporaryFolder(), "model.gguf");
  writeFileSync(path, ggufBytes(METADATA, tensors));
  const model = await loadModel({ path });
  const runner = await openModelRunner({ model, gpu, kvFormat: "f16", blockTokens: 32, residualTokens: 32 });
  model.close();
  const { token, logits } = await prefill(runner, promptTokens(40, CONFIG.vocabulary, 9), 0, pages(0, 4));
  const tokens = await decodeGreedy(runner, 0, pages(0, 4), 40, token, 4);
  const { weights } = runner.memory();
  await runner.close();
  return { logits, tokens, weights };
}

async function expectSameAnswer(typeOf: TypeOf): Promise<{ packedBytes: number; decodedBytes: number }> {
  const { packed, decoded } = tensorPair(typeOf);
  const expected = await answer(decoded);
  const actual = await answer(packed);
  const spread = Math.max(...expected.logits) - Math.min(...expected.logits);
  expect(spread).toBeGreaterThan(0.5);
  // Weights are the same numbers; K and V may round to another half, by which logits move about 1e-4 of their spread.
  const worst = expected.logits.reduce(
    (most, logit, i) => Math.max(most, Math.abs(logit - (actual.logits[i] ?? 0))),
    0,
  );
  expect(worst / spread).toBeLessThan(2e-3);
  expect(actual.tokens).toEqual(expected.tokens);
  return { packedBytes: actual.weights, decodedBytes: expected.weights };
}

test.each<[GgmlType, number]>([
  // And the share of f32's bytes that they may take in GPU memory.
  ["F16", 0.51],
  ["BF16", 0.51],
  ["Q8_0", 0.29],
  ["Q4_0", 0.17],
  ["Q4_1", 0.17],
  ["Q5_0", 0.29],
  ["Q5_1", 0.32],
  ["Q4_K", 0.2],
  ["Q5_K", 0.32],
  ["Q6_K", 0.33],
])("%s weights answer as the same weights in f32, and stay small in GPU memory", async (type, share) => {
  const { packedBytes, decodedBytes } = await expectSameAnswer(() => type);
  expect(packedBytes / decodedBytes).toBeLessThan(share + 0.01);
});

test("matrices that cannot be stacked are kept apart", async () => {
  const mixed: TypeOf = (name) => (name.includes("attn_v") || name.includes("ffn_up") ? "Q8_0" : "Q4_1");
  await expectSameAnswer(mixed);
});
