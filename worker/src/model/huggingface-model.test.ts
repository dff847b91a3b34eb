import { cpSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import { huggingFaceConfig } from "./huggingface-config.ts";
import { loadModel } from "./load-model.ts";
import { temporaryFolder } from "./testing/temporary-folder.ts";

const source = fileURLToPath(new URL("../../../integration-tests/golden/tiny-llama-gqa", import.meta.url));

function copy(): string {
  const folder = join(temporaryFolder(), "tiny");
  cpSync(source, folder, { recursive: true });
  return folder;
}

function editJson(path: string, edit: (json: Record<string, unknown>) => void): void {
  const json = JSON.parse(readFileSync(path, "utf8"));
  edit(json);
  writeFileSync(path, JSON.stringify(json));
}

type Header = Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;

function readTensors(path: string): { header: Header; data: Buffer } {
  const bytes = readFileSync(path);
  const length = Number(bytes.readBigUInt64LE(0));
  return { header: JSON.parse(bytes.subarray(8, 8 + length).toString()), data: bytes.subarray(8 + length) };
}

function writeTensors(path: string, header: Header, data: Buffer): void {
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  writeFileSync(path, Buffer.concat([length, json, data]));
}

/** Splits the model's file in two, with an index. */
function shard(folder: string): void {
  const path = join(folder, "model.safetensors");
  const { header, data } = readTensors(path);
  const names = Object.keys(header).filter((name) => name !== "__metadata__");
  const weight_map: Record<string, string> = {};
  for (const [index, part] of [names.slice(0, 5), names.slice(5)].entries()) {
    const file = `model-0000${index + 1}-of-00002.safetensors`;
    const pieces: Buffer[] = [];
    const own: Header = {};
    let offset = 0;
    for (const name of part) {
      const entry = header[name] as Header[string];
      const piece = data.subarray(...entry.data_offsets);
      own[name] = { ...entry, data_offsets: [offset, offset + piece.length] };
      offset += piece.length;
      pieces.push(piece);
      weight_map[name] = file;
    }
    writeTensors(join(folder, file), own, Buffer.concat(pieces));
  }
  writeFileSync(join(folder, "model.safetensors.index.json"), JSON.stringify({ metadata: {}, weight_map }));
  rmSync(path);
}

describe("a folder with safetensors", () => {
  test("gives config, tensors and tokenizer", async () => {
    const model = await loadModel({ path: source });
    expect(model.name).toBe("tiny-llama-gqa");
    expect(model.config).toMatchObject({ layers: 2, hidden: 64, feedForward: 128, heads: 4, kvHeads: 2, headDim: 32 });
    expect(model.config.rope).toEqual({
      theta: 10_000,
      dimensions: 32,
      layout: "half",
      scaling: { type: "llama3", factor: 8, lowFrequencyFactor: 1, highFrequencyFactor: 4, originalContext: 64 },
    });
    expect(model.tokenizer.endTokenIds).toContain(0);
    expect(JSON.parse(model.tokenizer.tokenizerJson).model.type).toBe("BPE");
    model.close();
  });

  test("in shards gives the same tensors", async () => {
    const folder = copy();
    shard(folder);
    expect(readdirSync(folder)).not.toContain("model.safetensors");
    const [one, two] = await Promise.all([loadModel({ path: source }), loadModel({ path: folder })]);
    expect([...two.tensors.keys()].sort()).toEqual([...one.tensors.keys()].sort());
    for (const [name, tensor] of one.tensors) expect(two.tensors.get(name)?.read(), name).toEqual(tensor.read());
    expect(Buffer.from(two.digest)).not.toEqual(Buffer.from(one.digest));
    rmSync(join(folder, "model-00002-of-00002.safetensors"));
    await expect(loadModel({ path: folder })).rejects.toMatchObject({
      code: "MODEL_FILE_INVALID",
      message: expect.stringContaining('"model-00002-of-00002.safetensors", which is not in the folder'),
    });
    one.close();
    two.close();
  });

  test("cut short names the tensor", async () => {
    const folder = copy();
    const path = join(folder, "model.safetensors");
    const bytes = readFileSync(path);
    writeFileSync(path, bytes.subarray(0, bytes.length - 100));
    await expect(loadModel({ path: folder })).rejects.toMatchObject({
      code: "MODEL_FILE_INVALID",
      message: expect.stringMatching(/truncated: tensor ".+" ends at byte/),
    });
    writeFileSync(path, bytes.subarray(0, 100));
    await expect(loadModel({ path: folder })).rejects.toMatchObject({ code: "MODEL_FILE_INVALID" });
  });

  test("with a wrong tensor names it", async () => {
    const folder = copy();
    const path = join(folder, "model.safetensors");
    const { header, data } = readTensors(path);
    const name = "model.layers.1.mlp.up_proj.weight";
    const entry = header[name] as Header[string];
    writeTensors(path, { ...header, [name]: { ...entry, dtype: "I8" } }, data);
    await expect(loadModel({ path: folder })).rejects.toMatchObject({
      code: "MODEL_UNSUPPORTED",
      message: expect.stringMatching(/"model.layers.1.mlp.up_proj.weight" has type I8; supported are F32, F16, BF16/),
    });
    const { [name]: removed, ...others } = header;
    expect(removed).toBeDefined();
    writeTensors(path, others, data);
    await expect(loadModel({ path: folder })).rejects.toMatchObject({
      code: "MODEL_FILE_INVALID",
      message: expect.stringContaining('"blk.1.ffn_up.weight" is missing'),
    });
  });

  test.each([
    ["model_type", "mixtral", "MODEL_UNSUPPORTED", /model_type" is mixtral; supported: llama, mistral/],
    ["hidden_act", "gelu", "MODEL_UNSUPPORTED", /hidden_act/],
    ["attention_bias", true, "MODEL_UNSUPPORTED", /attention_bias/],
    ["rope_scaling", { rope_type: "yarn", factor: 4 }, "MODEL_UNSUPPORTED", /rope_type" is yarn/],
    ["rope_scaling", { rope_type: "llama3", factor: 4 }, "MODEL_FILE_INVALID", /low_freq_factor" is missing/],
    ["hidden_size", undefined, "MODEL_FILE_INVALID", /hidden_size/],
    ["num_key_value_heads", 3, "MODEL_FILE_INVALID", /3 key\/value heads/],
    ["vocab_size", 300, "MODEL_FILE_INVALID", /"token_embd.weight" is 256 x 64.*300 x 64/],
  ])("with %s = %s is refused by name", async (key, value, code, message) => {
    const folder = copy();
    editJson(join(folder, "config.json"), (config) => {
      config[key] = value;
    });
    await expect(loadModel({ path: folder })).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  });

  test("without a tokenizer says so", async () => {
    const folder = copy();
    rmSync(join(folder, "tokenizer.json"));
    await expect(loadModel({ path: folder })).rejects.toMatchObject({
      code: "MODEL_FILE_INVALID",
      message: expect.stringContaining("tokenizer.json: is missing"),
    });
  });
});

test("newer configs keep theta and scaling under rope_parameters", () => {
  const {
    rope_theta: _theta,
    rope_scaling: _scaling,
    ...config
  } = JSON.parse(readFileSync(join(source, "config.json"), "utf8"));
  const rope_parameters = { rope_type: "linear", factor: 2, rope_theta: 77_000 };
  const parsed = huggingFaceConfig("config.json", { ...config, rope_parameters, sliding_window: 100 });
  expect(parsed.rope).toMatchObject({ theta: 77_000, scaling: { type: "linear", factor: 2 } });
  expect(parsed.contextTokens).toBe(100);
});
