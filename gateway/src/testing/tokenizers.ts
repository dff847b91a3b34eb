/** Small real tokenizers for tests, in the layout of Hugging Face files. */
import type { TokenizerSource } from "../tokenizer.ts";

const chatml =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}" +
  "{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + message['role']) }}" +
  "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/** GPT-2's characters for the 256 bytes, in byte order. */
function byteCharacters(): string[] {
  const printable = (byte: number) =>
    (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
}

/**
 * Byte-level BPE: ids 0–255 are the bytes, then merges (some of which end inside a character), then special tokens:
 * `<|im_start|>`, `<|im_end|>`, `<|endoftext|>`, and the added but not special `<note>`.
 */
export function byteLevelSource(): TokenizerSource & {
  readonly ids: Record<string, number>;
  readonly vocabulary: number;
} {
  const characters = byteCharacters();
  const at = (byte: number) => characters[byte] ?? "";
  // "th", " t", the first two and three bytes of most emoji, and the end of one with the next one's beginning.
  const merges: [string, string][] = [
    ["t", "h"],
    [at(0x20), "t"],
    [at(0xf0), at(0x9f)],
    [at(0xf0) + at(0x9f), at(0x98)],
    [at(0x80), at(0xf0)],
  ];
  const tokens = [...characters, ...merges.map(([left, right]) => left + right)];
  const names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<note>"];
  const ids = Object.fromEntries(names.map((name, index) => [name, tokens.length + index]));
  const json = {
    version: "1.0",
    added_tokens: names.map((content) => ({
      id: ids[content],
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: content !== "<note>",
    })),
    normalizer: null,
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges,
    },
  };
  return {
    name: "byte-level",
    tokenizerJson: JSON.stringify(json),
    tokenizerConfigJson: JSON.stringify({
      eos_token: "<|im_end|>",
      bos_token: "<|im_start|>",
      clean_up_tokenization_spaces: false,
    }),
    chatTemplate: chatml,
    endTokenIds: [ids["<|im_end|>"] ?? 0, ids["<|endoftext|>"] ?? 0],
    beginTokenId: -1,
    ids,
    vocabulary: tokens.length + names.length,
  };
}

/** SentencePiece style: `<s>`, `</s>`, byte-fallback tokens, and a few pieces with U+2581 for spaces; `<s>` comes first. */
export function byteFallbackSource(): TokenizerSource & { readonly vocabulary: number } {
  const bytes = Array.from({ length: 256 }, (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  const tokens = ["<unk>", "<s>", "</s>", ...bytes, "\u2581", "a", "\u2581Hello", "\u2581world", "\u00e9", "\u65e5"];
  const special = (content: string, id: number) => ({
    id,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  });
  const json = {
    version: "1.0",
    added_tokens: [special("<unk>", 0), special("<s>", 1), special("</s>", 2)],
    normalizer: null,
    pre_tokenizer: { type: "Metaspace", replacement: "\u2581", prepend_scheme: "first" },
    post_processor: null,
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: "\u2581" }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: 1, stop: 0 },
      ],
    },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: "<unk>",
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: true,
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges: [],
    },
  };
  return {
    name: "byte-fallback",
    tokenizerJson: JSON.stringify(json),
    tokenizerConfigJson: JSON.stringify({ bos_token: { content: "<s>" }, eos_token: "</s>" }),
    chatTemplate: "",
    endTokenIds: [2],
    beginTokenId: 1,
    vocabulary: tokens.length,
  };
}
