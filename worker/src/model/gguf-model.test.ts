import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { dequantizeGgml } from "@kivimesh/kernels";
import { describe, expect, test } from "vitest";
import { byteLetters } from "./byte-tokenizer.ts";
import { dummyModel } from "./dummy-model.ts";
import { loadModel } from "./load-model.ts";
import { type GgufTensorData, type GgufValue, ggufBytes, ggufTensors } from "./testing/gguf-writer.ts";
import { smollm2Path } from "./testing/smollm2.ts";
import { temporaryFolder } from "./testing/temporary-folder.ts";

const tiny = dummyModel("tiny-llama");

const METADATA: Readonly<Record<string, GgufValue>> = {
  "general.architecture": "llama",
  "llama.block_count": 2,
  "llama.context_length": 2048,
  "llama.embedding_length": 64,
  "llama.feed_forward_length": 160,
  "llama.attention.head_count": 4,
  "llama.attention.head_count_kv": 2,
  "llama.attention.key_length": 32,
  "llama.attention.value_length": 32,
  "llama.attention.layer_norm_rms_epsilon": 0.00001,
  "llama.rope.freq_base": 10_000.5,
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.pre": "gpt-2",
  "tokenizer.ggml.tokens": [...byteLetters(), "<s>", "</s>", ...Array.from({ length: 62 }, (_, i) => `w${i}`)],
  "tokenizer.ggml.token_type": [...new Array<number>(256).fill(1), 3, 3, ...new Array<number>(62).fill(1)],
  "tokenizer.ggml.merges": ["a b"],
  "tokenizer.ggml.bos_token_id": 256,
  "tokenizer.ggml.eos_token_id": 257,
  "tokenizer.ggml.add_bos_token": true,
};

function tinyFile(
  metadata: Record<string, GgufValue | undefined> = {},
  change: (tensors: GgufTensorData[]) => GgufTensorData[] = (tensors) => tensors,
): string {
  const path = join(temporaryFolder(), "tiny.gguf");
  const merged = Object.entries({ ...METADATA, ...metadata }).filter(([, value]) => value !== undefined);
  const all = Object.fromEntries(merged) as Record<string, GgufValue>;
  writeFileSync(path, ggufBytes(all, change(ggufTensors(tiny.tensors.values()))));
  return path;
}

describe("a GGUF file", () => {
  test("gives config, tensors and tokenizer", async () => {
    const path = tinyFile();
    const model = await loadModel({ path });
    expect(model.name).toBe("tiny");
    expect(model.config).toMatchObject({ layers: 2, hidden: 64, heads: 4, kvHeads: 2, headDim: 32, vocabulary: 320 });
    expect(model.config.rope).toEqual({ theta: 10_000.5, dimensions: 32, layout: "interleaved" });
    expect(model.config.tiedEmbedding).toBe(true);
    const name = "blk.1.ffn_down.weight";
    expect(model.tensors.get(name)?.read()).toEqual(tiny.tensors.get(name)?.read());
    expect(model.tokenizer).toMatchObject({ beginTokenId: 256, endTokenIds: [257], chatTemplate: "" });
    expect(model.digest).toHaveLength(32);
    expect(Buffer.from((await loadModel({ path })).digest)).toEqual(Buffer.from(model.digest));
    model.close();
  });

  test("keeps scaling of the rotary embedding", async () => {
    const scaled = await loadModel({
      path: tinyFile({ "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5 }),
    });
    expect(scaled.config.rope.scaling).toEqual({ type: "linear", factor: 2.5 });
    const factors = new Float32Array(16).fill(3);
    const tensor = { name: "rope_freqs.weight", type: 0, rows: 1, columns: 16, data: new Uint8Array(factors.buffer) };
    const stretched = await loadModel({ path: tinyFile({}, (tensors) => [...tensors, tensor]) });
    expect(stretched.config.rope.frequencyFactors).toEqual([...factors]);
  });

  test("cut short names the tensor that is missing bytes", async () => {
    const path = tinyFile();
    const whole = ggufBytes(METADATA, ggufTensors(tiny.tensors.values()));
    writeFileSync(path, whole.subarray(0, whole.length - 40));
    await expect(loadModel({ path })).rejects.toMatchObject({
      code: "MODEL_FILE_INVALID",
      message: expect.stringMatching(/truncated.*"output_norm.weight"/),
    });
    writeFileSync(path, whole.subarray(0, 2000));
    await expect(loadModel({ path })).rejects.toMatchObject({ code: "MODEL_FILE_INVALID" });
    writeFileSync(path, "not a model at all");
    await expect(loadModel({ path })).rejects.toMatchObject({
      code: "MODEL_FILE_INVALID",
      message: expect.stringContaining("GGUF"),
    });
  });

  test.each([
    ["general.architecture", "mamba", "MODEL_UNSUPPORTED", /architecture" is mamba; supported: llama/],
    ["split.count", 2, "MODEL_UNSUPPORTED", /split.count" is 2; supported: 1/],
    ["llama.expert_count", 8, "MODEL_UNSUPPORTED", /expert_count/],
    ["llama.rope.scaling.type", "yarn", "MODEL_UNSUPPORTED", /yarn/],
    ["llama.embedding_length", undefined, "MODEL_FILE_INVALID", /embedding_length" is missing/],
    ["llama.attention.head_count_kv", 3, "MODEL_FILE_INVALID", /3 key\/value heads do not divide 4/],
    ["llama.block_count", 3, "MODEL_FILE_INVALID", /"blk.2.attn_norm.weight" is missing/],
    ["llama.feed_forward_length", 128, "MODEL_FILE_INVALID", /"blk.0.ffn_gate.weight" is 160 x 64.*128 x 64/],
    ["tokenizer.ggml.pre", "unheard-of", "MODEL_UNSUPPORTED", /unheard-of; supported: gpt-2/],
    ["tokenizer.ggml.model", "rwkv", "MODEL_UNSUPPORTED", /rwkv/],
    ["tokenizer.ggml.merges", undefined, "MODEL_FILE_INVALID", /merges" is missing/],
  ])("with %s = %s is refused by name", async (key, value, code, message) => {
    const path = tinyFile({ [key]: value as GgufValue | undefined });
    await expect(loadModel({ path })).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  });

  test("with a tensor that cannot be run is refused by name", async () => {
    const bias = { name: "blk.0.attn_q.bias", type: 0, rows: 1, columns: 128, data: new Uint8Array(512) };
    const biased = tinyFile({}, (tensors) => [...tensors, bias]);
    await expect(loadModel({ path: biased })).rejects.toMatchObject({
      code: "MODEL_UNSUPPORTED",
      message: expect.stringContaining('"blk.0.attn_q.bias"'),
    });
    const exotic = tinyFile({}, ([first, ...rest]) => [{ ...(first as GgufTensorData), type: 20 }, ...rest]);
    await expect(loadModel({ path: exotic })).rejects.toMatchObject({
      code: "MODEL_UNSUPPORTED",
      message: expect.stringMatching(/"token_embd.weight" has type IQ4_NL; supported are F32/),
    });
  });

  test("that is not there is MODEL_NOT_FOUND", async () => {
    await expect(loadModel({ path: "/nowhere/model.gguf" })).rejects.toMatchObject({ code: "MODEL_NOT_FOUND" });
  });
});

test("SmolLM2's file is read as published", async () => {
  const model = await loadModel({ path: smollm2Path() });
  expect(Buffer.from(model.digest).toString("hex")).toBe(
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
  );
  expect(model.config).toMatchObject({
    layers: 30,
    hidden: 576,
    heads: 9,
    kvHeads: 3,
    headDim: 64,
    vocabulary: 49_152,
  });
  expect(model.tokenizer.endTokenIds).toEqual([0, 2]);
  expect(model.tokenizer.beginTokenId).toBe(-1);
  const types = new Set([...model.tensors.values()].map(({ type }) => type));
  expect(types).toEqual(new Set(["Q8_0", "F32", "Q4_1"]));
  const norm = model.tensors.get("output_norm.weight");
  const values = dequantizeGgml("F32", norm?.read() ?? new Uint8Array(), 576);
  expect(new Set(values).size).toBeGreaterThan(50);
  expect(values.every((value) => Number.isFinite(value))).toBe(true);
  model.close();
});
