import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { submitPass, uploadStorage } from "./buffers.ts";
import { type DeviceProfile, type Gpu, openGpu } from "./device.ts";
import { createEmbedding } from "./embedding.ts";
import { dequantizeGgml, GGML_TYPES, ggmlBlock } from "./ggml-quants.ts";
import { createLinearWeight } from "./linear-weight.ts";
import { assertClose } from "./testing/comparison.ts";
import { randomGgml } from "./testing/ggml-blocks.ts";
import { assertNoPoison, createPoisoned } from "./testing/poison.ts";
import { seededRandom } from "./testing/random.ts";

describe.each(["software", "hardware"] as const)("embedding, %s profile", (profile: DeviceProfile) => {
  let gpu: Gpu;
  const random = seededRandom(`embedding ${profile}`);
  beforeAll(async () => {
    gpu = await openGpu({ profile, unchecked: false });
  });
  afterAll(() => gpu.close());

  test.each(GGML_TYPES)("%s: gathers rows as the host decodes them", async (type) => {
    const hidden = Math.max(type === "F32" ? 4 : 8, ggmlBlock(type).elements) * random.integer(1, 5);
    const vocabulary = random.integer(2, 40);
    const data = randomGgml(random, type, vocabulary * hidden);
    const weight = createLinearWeight(gpu, {
      label: "table",
      parts: [{ type, rows: vocabulary, data }],
      columns: hidden,
    });
    const embedding = await createEmbedding(gpu, { weight, hidden });
    const tokens = Uint32Array.from({ length: random.integer(1, 70) }, () => random.integer(0, vocabulary - 1));
    tokens[0] = vocabulary - 1;
    const output = createPoisoned(gpu, "output", tokens.length * hidden * 4);
    const bound = embedding.bind({ tokens: uploadStorage(gpu, "tokens", tokens), output: output.buffer });
    submitPass(gpu, (pass) => bound.encode(pass, tokens.length));
    const content = await output.read();
    assertNoPoison("embedding", content);
    const table = dequantizeGgml(type, data, vocabulary * hidden);
    const expected = new Float32Array(tokens.length * hidden);
    for (const [row, token] of tokens.entries()) {
      expected.set(table.subarray(token * hidden, (token + 1) * hidden), row * hidden);
    }
    assertClose(`${type} ${vocabulary}×${hidden}`, new Float32Array(content), expected, { nmse: 1e-13, maxAbs: 1e-6 });
  });

  test("a token outside the table makes a row of NaN and no other", async () => {
    const data = randomGgml(random, "Q8_0", 3 * 32);
    const weight = createLinearWeight(gpu, { label: "table", parts: [{ type: "Q8_0", rows: 3, data }], columns: 32 });
    const embedding = await createEmbedding(gpu, { weight, hidden: 32 });
    const output = createPoisoned(gpu, "output", 3 * 32 * 4);
    const tokens = uploadStorage(gpu, "tokens", new Uint32Array([2, 3, 0]));
    const bound = embedding.bind({ tokens, output: output.buffer });
    submitPass(gpu, (pass) => bound.encode(pass, 3));
    const values = new Float32Array(await output.read());
    expect(values.slice(32, 64).every(Number.isNaN)).toBe(true);
    expect(values.slice(0, 32).some(Number.isNaN) || values.slice(64).some(Number.isNaN)).toBe(false);
  });

  test("refuses a hidden size that is not the table's", async () => {
    const data = randomGgml(random, "F32", 8);
    const weight = createLinearWeight(gpu, { label: "table", parts: [{ type: "F32", rows: 2, data }], columns: 4 });
    await expect(createEmbedding(gpu, { weight, hidden: 8 })).rejects.toThrow(/4 columns, embedding has 8/);
  });
});
