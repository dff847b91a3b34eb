import { Tokenizer } from "@huggingface/tokenizers";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { byteFallbackSource, byteLevelSource } from "./testing/tokenizers.ts";
import { tokenPieces } from "./token-pieces.ts";
import { ModelTokenizer, type TokenizerSource } from "./tokenizer.ts";

function oracle(source: TokenizerSource) {
  const tokenizer = new Tokenizer(JSON.parse(source.tokenizerJson), JSON.parse(source.tokenizerConfigJson));
  return (ids: number[]) =>
    ids.length === 0 ? "" : tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
}

function stream(tokenizer: ModelTokenizer, ids: readonly number[]): { pieces: string[]; end: string } {
  const detokenizer = tokenizer.detokenizer();
  return { pieces: ids.map((id) => detokenizer.push(id)), end: detokenizer.finish() };
}

describe("Detokenizer", () => {
  const source = byteLevelSource();
  const tokenizer = new ModelTokenizer(source);
  const decode = oracle(source);

  it("gives any ids the text of the library's whole decode", () => {
    const id = fc.oneof(
      fc.integer({ min: 0, max: source.vocabulary - 1 }),
      fc.integer({ min: 0x80, max: 0xff }),
      fc.integer({ min: 256, max: source.vocabulary - 1 }),
    );
    fc.assert(
      fc.property(fc.array(id, { maxLength: 40 }), (ids) => {
        const { pieces, end } = stream(tokenizer, ids);
        expect(pieces.join("") + end).toBe(decode(ids));
      }),
      { numRuns: 2000 },
    );
  });

  it("gives back every text, never with a broken character", () => {
    fc.assert(
      fc.property(fc.string({ unit: "grapheme", maxLength: 30 }), (text) => {
        fc.pre(!text.includes("\ufffd") && !text.includes("<"));
        const { pieces, end } = stream(tokenizer, tokenizer.encode(text));
        expect(pieces.join("") + end).toBe(text);
        for (const piece of pieces) {
          // A lone half of a surrogate pair would not survive UTF-8.
          expect(Buffer.from(piece, "utf8").toString("utf8")).toBe(piece);
          expect(piece).not.toContain("\ufffd");
        }
      }),
      { numRuns: 1000 },
    );
  });

  it("holds the bytes of an unfinished character and shows them when it is whole", () => {
    const ids = tokenizer.encode("😀😀");
    expect(ids.length).toBeGreaterThan(2);
    const { pieces, end } = stream(tokenizer, ids);
    expect(pieces[0]).toBe("");
    expect(pieces.join("")).toBe("😀😀");
    expect(end).toBe("");
    const cut = stream(tokenizer, ids.slice(0, 1));
    expect(cut).toEqual({ pieces: [""], end: "\ufffd" });
  });

  it("never shows special tokens, end tokens and unknown ids, and shows added ones that are not special", () => {
    const ids = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<note>"].map((name) => source.ids[name] ?? -1);
    const { pieces, end } = stream(tokenizer, [65, ...ids, 99_999, 66]);
    expect(pieces.join("") + end).toBe("A<note>B");
  });

  it("continues a prompt in byte-fallback vocabularies as the whole decode does", () => {
    const fallback = byteFallbackSource();
    const model = new ModelTokenizer(fallback);
    const whole = oracle(fallback);
    const prompt = [261]; // "▁Hello"
    // The oracle drops a byte-order mark at the start of a run of bytes.
    const id = fc.integer({ min: 0, max: fallback.vocabulary - 1 }).filter((value) => value !== 3 + 0xef);
    fc.assert(
      fc.property(fc.array(id, { maxLength: 30 }), (ids) => {
        const { pieces, end } = stream(model, ids);
        expect(whole(prompt) + pieces.join("") + end).toBe(whole([...prompt, ...ids]));
      }),
      { numRuns: 1000 },
    );
  });

  it("refuses decoders that need several tokens at once, by name", () => {
    expect(() => tokenPieces({ type: "WordPiece", prefix: "##" })).toThrow(/WordPiece/);
    expect(() => tokenPieces(null)).toThrow(/no decoder/);
  });
});
