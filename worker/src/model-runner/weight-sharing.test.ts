import { expect, test } from "vitest";
import { dummyModel } from "../model/dummy-model.ts";
import type { LoadedModel, ModelTensor } from "../model/loaded-model.ts";
import { openModelRunner } from "./open-model-runner.ts";
import { GREEDY, pages, promptTokens } from "./testing/sequences.ts";

/** The model whose second layer has the first one's matrices, and how many bytes of tensors were read. */
function repeated(declared: boolean): { model: LoadedModel; bytesRead: () => number } {
  const model = dummyModel("tiny-llama");
  let bytes = 0;
  const tensors = new Map<string, ModelTensor>();
  for (const [name, tensor] of model.tensors) {
    const original = name.replace("blk.1.", "blk.0.");
    const source = model.tensors.get(original) as ModelTensor;
    const read = () => {
      bytes += tensor.bytes;
      return source.read();
    };
    tensors.set(name, { ...tensor, read, ...(declared && original !== name ? { sameAs: original } : {}) });
  }
  return { model: { ...model, tensors }, bytesRead: () => bytes };
}

async function firstLogits(model: LoadedModel): Promise<Float32Array> {
  const runner = await openModelRunner({ model, maxSequences: 1 });
  try {
    const tokens = promptTokens(20, model.config.vocabulary, 1);
    const chunk = { slot: 0, tokens, position: 0, pageTable: pages(0, 1), sample: GREEDY, returnLogits: true };
    const { sampled } = await runner.step({ prefill: [chunk], decode: [] });
    return sampled[0]?.logits as Float32Array;
  } finally {
    await runner.close();
  }
}

test("layers that are declared equal are copied on the GPU, and give what reading them gives", async () => {
  const [read, copied] = [repeated(false), repeated(true)];
  expect(await firstLogits(copied.model)).toEqual(await firstLogits(read.model));
  expect(copied.bytesRead()).toBeLessThan(read.bytesRead());
});

test("large dummy models declare it, with the content that it says", () => {
  const { tensors } = dummyModel("llama-3.1-8b");
  const [first, last] = ["blk.0.attn_k.weight", "blk.31.attn_k.weight"].map((name) => tensors.get(name));
  expect(last?.sameAs).toBe(first?.name);
  expect(Buffer.compare(last?.read() as Uint8Array, first?.read() as Uint8Array)).toBe(0);
  expect(first?.sameAs).toBeUndefined();
  for (const { sameAs } of dummyModel("smollm2-135m").tensors.values()) expect(sameAs).toBeUndefined();
});
