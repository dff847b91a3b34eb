import { dequantizeGgml } from "@kivimesh/kernels";
import { expect, test } from "vitest";
import { DUMMY_ARCHITECTURES, dummyModel } from "./dummy-model.ts";
import { checkConfig, checkLlamaTensors } from "./llama-tensors.ts";

test("every architecture is a consistent Llama model", () => {
  expect(DUMMY_ARCHITECTURES).toContain("llama-3.1-8b");
  for (const name of DUMMY_ARCHITECTURES) {
    const model = dummyModel(name);
    checkConfig(name, model.config);
    checkLlamaTensors(name, model.config, model.tensors);
    const parameters = [...model.tensors.values()].reduce((sum, { rows, columns }) => sum + rows * columns, 0);
    if (name === "llama-2-7b") expect(parameters).toBe(6_738_415_616);
    if (name === "llama-3.1-8b") expect(parameters).toBe(8_030_261_248);
  }
});

test("the seed decides the weights and the digest", () => {
  const name = "blk.0.attn_q.weight";
  const [one, again, other] = [dummyModel("tiny-llama"), dummyModel("tiny-llama"), dummyModel("tiny-llama", 1)];
  expect(one.tensors.get(name)?.read()).toEqual(again.tensors.get(name)?.read());
  expect(one.tensors.get(name)?.read()).not.toEqual(other.tensors.get(name)?.read());
  expect(one.digest).toEqual(again.digest);
  expect(one.digest).not.toEqual(other.digest);
  expect(one.digest).not.toEqual(dummyModel("tiny-llama-mha").digest);
});

test.each(["tiny-llama", "tiny-llama-mha", "smollm2-135m"])("matrices of %s have variance 1 / inputs", (name) => {
  const model = dummyModel(name);
  for (const tensorName of ["token_embd.weight", "blk.0.ffn_down.weight", "blk.1.attn_q.weight"]) {
    const tensor = model.tensors.get(tensorName);
    if (tensor === undefined) throw new Error(`${tensorName} is missing`);
    const values = dequantizeGgml(tensor.type, tensor.read(), tensor.rows * tensor.columns);
    let sum = 0;
    let squares = 0;
    for (const value of values) {
      sum += value;
      squares += value * value;
    }
    expect(Math.abs(sum / values.length) * Math.sqrt(tensor.columns)).toBeLessThan(0.06);
    expect((squares / values.length) * tensor.columns).toBeCloseTo(1, 1);
  }
});

test("an unknown architecture is refused with the known ones", () => {
  expect(() => dummyModel("gpt-5")).toThrow(/unknown architecture "gpt-5".*tiny-llama, /);
});
