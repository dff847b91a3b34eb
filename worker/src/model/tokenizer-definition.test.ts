import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
import { expect, test } from "vitest";
import { dummyModel } from "./dummy-model.ts";
import { GgufFields } from "./gguf-config.ts";
import { ggufTokenizer } from "./gguf-tokenizer.ts";
import { loadModel } from "./load-model.ts";
import type { TokenizerDefinition } from "./loaded-model.ts";
import { mergesOfScores } from "./sentencepiece-tokenizer.ts";
import { smollm2Path } from "./testing/smollm2.ts";

const golden = new URL("../../../integration-tests/golden/", import.meta.url);

function tokenizerOf(definition: TokenizerDefinition): Tokenizer {
  return new Tokenizer(JSON.parse(definition.tokenizerJson), JSON.parse(definition.tokenizerConfigJson));
}

interface TokenizerGolden {
  readonly template: string;
  readonly strings: readonly { text: string; ids: number[]; decoded: string }[];
  readonly chats: readonly { text: string; ids: number[] }[];
}

test("SmolLM2's tokens equal those of the reference tokenizer", async () => {
  const expected: TokenizerGolden = JSON.parse(readFileSync(new URL("smollm2-tokenizer.json", golden), "utf8"));
  const model = await loadModel({ path: smollm2Path() });
  model.close();
  expect(model.tokenizer.chatTemplate).toBe(expected.template);
  const tokenizer = tokenizerOf(model.tokenizer);
  expect(expected.strings.length).toBeGreaterThan(40);
  for (const { text, ids, decoded } of expected.strings) {
    expect(tokenizer.encode(text).ids, JSON.stringify(text)).toEqual(ids);
    if (ids.length > 0) expect(tokenizer.decode(ids, { skip_special_tokens: false })).toBe(decoded);
  }
  for (const { text, ids } of expected.chats) expect(tokenizer.encode(text).ids, JSON.stringify(text)).toEqual(ids);
});

test("the byte tokenizer of dummy models brings every text back", () => {
  const tokenizer = tokenizerOf(dummyModel("tiny-llama").tokenizer);
  for (const text of ["plain", "two  spaces\nand lines", "héllo 世界 🎉", "\u0000\u007f\u00ad"]) {
    const { ids } = tokenizer.encode(text);
    expect(ids).toEqual([...new TextEncoder().encode(text)]);
    expect(tokenizer.decode(ids)).toBe(text);
  }
  expect(tokenizer.encode("a<|end|>").ids).toEqual([97, 257]);
  expect(tokenizer.decode([300, 301])).toBe(" w300 w301");
});

/** Fields as a GGUF file would give them. */
function fields(metadata: Record<string, unknown>): GgufFields {
  return new GgufFields("test.gguf", metadata);
}

const LETTERS = [..."abcdefghijklmnopqrstuvwxyz0123456789'.,! \n"].map((letter) =>
  letter === " " ? "\u0120" : letter === "\n" ? "\u010a" : letter,
);

test.each([
  // Words that the pre-tokenizer keeps whole come back as one piece a word.
  ["llama-bpe", "it's 12345 ok!!\n\nnow", ["it", "'s", "\u0120", "123", "45", "\u0120ok", "!!\u010a\u010a", "now"]],
  ["qwen2", "it's 123 ok!!\n\nnow", ["it", "'s", "\u0120", "1", "2", "3", "\u0120ok", "!!\u010a\u010a", "now"]],
  ["gpt-2", "it's 123 ok!!\n\nnow", ["it", "'s", "\u0120123", "\u0120ok", "!!", "\u010a", "\u010a", "now"]],
  ["smollm", "it's 12 ok!!", ["it", "'s", "\u0120", "1", "2", "\u0120ok", "!!"]],
])("pre-tokenizer %s splits as its models were trained", (pre, text, words) => {
  const pieces = new Set<string>(LETTERS);
  const merges: string[] = [];
  for (const word of words) {
    for (let end = 2; end <= word.length; end++) {
      const merge = `${word.slice(0, end - 1)} ${word[end - 1]}`;
      if (!pieces.has(word.slice(0, end))) merges.push(merge);
      pieces.add(word.slice(0, end));
    }
  }
  const tokens = [...pieces];
  const definition = ggufTokenizer(
    fields({
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": pre,
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.merges": merges,
    }),
  );
  const { ids } = tokenizerOf(definition).encode(text);
  expect(ids.map((id: number) => tokens[id])).toEqual(words);
});

test("a SentencePiece vocabulary: merges from scores, byte fallback, begin token", () => {
  const space = "\u2581";
  const pieces = ["<unk>", "<s>", "</s>", ...Array.from({ length: 256 }, (_, byte) => byteToken(byte))];
  const words = [space, "h", "e", "l", "o", "he", "ll", "hell", "hello", `${space}hello`, `${space}h`];
  const tokens = [...pieces, ...words];
  const definition = ggufTokenizer(
    fields({
      "tokenizer.ggml.model": "llama",
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": [2, 3, 3, ...new Array<number>(256).fill(6), ...words.map(() => 1)],
      "tokenizer.ggml.scores": [0, 0, 0, ...new Array<number>(256).fill(0), ...words.map((_, index) => -index)],
      "tokenizer.ggml.bos_token_id": 1,
      "tokenizer.ggml.eos_token_id": 2,
      "tokenizer.ggml.unknown_token_id": 0,
    }),
  );
  expect(definition).toMatchObject({ beginTokenId: 1, endTokenIds: [2] });
  const tokenizer = tokenizerOf(definition);
  const { ids } = tokenizer.encode("hello é");
  expect(ids.map((id: number) => tokens[id])).toEqual([
    "<s>",
    `${space}hello`,
    space,
    byteToken(0xc3),
    byteToken(0xa9),
  ]);
  expect(tokenizer.decode(ids, { skip_special_tokens: true })).toBe("hello é");
});

function byteToken(byte: number): string {
  return `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
}

test("merges are ordered by the score of what they make", () => {
  const tokens = ["a", "b", "c", "ab", "bc", "abc"];
  const scores = [0, 0, 0, -2, -1, -3];
  expect(mergesOfScores(tokens, scores)).toEqual([
    ["b", "c"],
    ["a", "b"],
    ["a", "bc"],
    ["ab", "c"],
  ]);
});
