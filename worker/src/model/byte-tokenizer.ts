/** A tokenizer without training: one token a byte, a few specials, and words " w260", ... to fill the vocabulary. */
import type { TokenizerDefinition } from "./loaded-model.ts";

const BEGIN = "<|begin|>";
const END = "<|end|>";
const SPECIALS = [BEGIN, END, "<|role|>", "<|text|>"];

const TEMPLATE = `{% for message in messages %}${"{{ '<|role|>' + message['role'] + '<|text|>' + message['content'] + '<|end|>' }}"}{% endfor %}{% if add_generation_prompt %}${"{{ '<|role|>assistant<|text|>' }}"}{% endif %}`;

/** The printable stand-ins that byte-level BPE vocabularies use for bytes 0 … 255 (GPT-2's table). */
export function byteLetters(): string[] {
  const letters: string[] = [];
  let spare = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    letters.push(String.fromCodePoint(printable ? byte : spare++));
  }
  return letters;
}

/** @param vocabulary ids in all: at least 260. */
export function byteTokenizer(vocabulary: number): TokenizerDefinition {
  if (vocabulary < 256 + SPECIALS.length) throw new RangeError(`${vocabulary} tokens cannot hold bytes and specials`);
  const tokens = [...byteLetters(), ...SPECIALS];
  while (tokens.length < vocabulary) tokens.push(`\u0120w${tokens.length}`);
  const tokenizer = {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: SPECIALS.map((content, index) => ({
      id: 256 + index,
      content,
      special: true,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
    })),
    normalizer: null,
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: { type: "ByteLevel", add_prefix_space: true, trim_offsets: false, use_regex: true },
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges: [],
    },
  };
  const config = {
    tokenizer_class: "PreTrainedTokenizerFast",
    bos_token: BEGIN,
    eos_token: END,
    add_bos_token: false,
    clean_up_tokenization_spaces: false,
    chat_template: TEMPLATE,
  };
  return {
    tokenizerJson: JSON.stringify(tokenizer),
    tokenizerConfigJson: JSON.stringify(config),
    chatTemplate: TEMPLATE,
    endTokenIds: [tokens.indexOf(END)],
    beginTokenId: -1,
  };
}
