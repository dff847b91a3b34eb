import { ClusterError } from "@kivimesh/proto";
import { describe, expect, it } from "vitest";
import { byteFallbackSource, byteLevelSource } from "./testing/tokenizers.ts";
import { ModelTokenizer } from "./tokenizer.ts";

const source = byteLevelSource();
const tokenizer = new ModelTokenizer(source);

function failure(act: () => unknown): ClusterError {
  try {
    act();
  } catch (error) {
    if (error instanceof ClusterError) return error;
    throw error;
  }
  throw new Error("did not fail");
}

describe("ModelTokenizer", () => {
  it("renders a chat with special tokens up to the assistant's turn", () => {
    const ids = tokenizer.encodeChat([{ role: "user", content: "hi" }]);
    const start = source.ids["<|im_start|>"];
    expect(ids).toEqual([
      start,
      ...tokenizer.encode("user\nhi"),
      source.ids["<|im_end|>"],
      ...tokenizer.encode("\n"),
      start,
      ...tokenizer.encode("assistant\n"),
    ]);
  });

  it("turns an error raised by the template into INVALID_ARGUMENT with its words", () => {
    const error = failure(() => tokenizer.encodeChat([{ role: "wizard", content: "hi" }]));
    expect(error.code).toBe("INVALID_ARGUMENT");
    expect(error.parameter).toBe("messages");
    expect(error.message).toContain("unknown role wizard");
  });

  it("says so where a model has no chat template", () => {
    const model = new ModelTokenizer(byteFallbackSource());
    expect(model.hasChatTemplate).toBe(false);
    expect(failure(() => model.encodeChat([{ role: "user", content: "x" }])).message).toMatch(/no chat template/);
  });

  it("puts the begin token first, once", () => {
    const model = new ModelTokenizer(byteFallbackSource());
    expect(model.encode("a")[0]).toBe(1);
    expect(model.encode("<s>a").filter((id) => id === 1)).toHaveLength(1);
  });

  it("refuses damaged files by name", () => {
    expect(failure(() => new ModelTokenizer({ ...source, tokenizerJson: "{" })).message).toMatch(/tokenizer\.json/);
    const broken = failure(() => new ModelTokenizer({ ...source, chatTemplate: "{% if %}" }));
    expect(broken.code).toBe("MODEL_FILE_INVALID");
  });
});
