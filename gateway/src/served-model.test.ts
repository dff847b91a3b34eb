import { create } from "@bufbuild/protobuf";
import { GetModelResponseSchema } from "@kivimesh/proto";
import { expect, it } from "vitest";
import { ModelCatalogue } from "./served-model.ts";
import { byteLevelSource } from "./testing/tokenizers.ts";

function described(name: string) {
  const { tokenizerJson, tokenizerConfigJson, chatTemplate, endTokenIds } = byteLevelSource();
  const digest = new Uint8Array(32).fill(1);
  const tokenizer = { tokenizerJson, tokenizerConfigJson, chatTemplate, endTokenIds: [...endTokenIds] };
  return create(GetModelResponseSchema, { name, digest, ...tokenizer, beginTokenId: -1, contextTokens: 512 });
}

it("a full catalogue forgets the longest known model that no worker serves, and none that one serves", () => {
  const catalogue = new ModelCatalogue();
  const served = new Set(["m0", "m2"]);
  const unserved = (known: { name: string }) => !served.has(known.name);
  for (let index = 0; index < 64; index++) {
    catalogue.add(described(`m${index}`), 0, unserved);
  }
  expect(catalogue.add(described("new"), 0, unserved).name).toBe("new");
  expect(() => catalogue.get("m1")).toThrow(/no model "m1"/);
  expect(catalogue.get("m0").name).toBe("m0");
  expect(catalogue.list()).toHaveLength(64);
  expect(() => catalogue.add(described("one more"), 0, () => false)).toThrow(/64 models/);
  expect(catalogue.list()).toHaveLength(64);
});
