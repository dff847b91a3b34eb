/** tokenizer.json of byte-level BPE vocabularies (GGUF `tokenizer.ggml.model = gpt2`). */
import type { GgufFields } from "./gguf-config.ts";
import { addedTokens, beginProcessor, type GgufVocabulary } from "./gguf-vocabulary.ts";

interface PreTokenizer {
  /** Split rules in the layout of tokenizer.json, ending with ByteLevel. */
  readonly steps: readonly Record<string, unknown>[];
  /** A word that is in the vocabulary as a whole is taken without merging. */
  readonly ignoreMerges?: boolean;
}

function byteLevel(useRegex: boolean): Record<string, unknown> {
  return { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: useRegex };
}

function split(pattern: string): Record<string, unknown> {
  return { type: "Split", pattern: { Regex: pattern }, behavior: "Isolated", invert: false };
}

const CONTRACTIONS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]";

/** Words with one leading character that is not a letter, runs of at most `digits` digits, punctuation, white space. */
function wordPattern(digits: string): string {
  return `(?:${CONTRACTIONS})|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;
}

const LLAMA3: PreTokenizer = { steps: [split(wordPattern("\\p{N}{1,3}")), byteLevel(false)], ignoreMerges: true };
const QWEN2: PreTokenizer = { steps: [split(wordPattern("\\p{N}")), byteLevel(false)] };
const GPT2: PreTokenizer = { steps: [byteLevel(true)] };
// Not the Digits step of tokenizer.json: implementations differ on digits beyond ASCII.
const SMOLLM: PreTokenizer = { steps: [split("\\p{N}"), byteLevel(true)] };

/** By the name in `tokenizer.ggml.pre`. */
const PRE_TOKENIZERS: ReadonlyMap<string, PreTokenizer> = new Map([
  ["gpt-2", GPT2],
  ["smollm", SMOLLM],
  ["llama-bpe", LLAMA3],
  ["llama3", LLAMA3],
  ["llama-v3", LLAMA3],
  ["qwen2", QWEN2],
]);

/** @throws ClusterError MODEL_UNSUPPORTED for an unknown pre-tokenizer: a guess would give wrong tokens. */
export function bpeTokenizer(fields: GgufFields, vocabulary: GgufVocabulary): Record<string, unknown> {
  const name = fields.text("tokenizer.ggml.pre", "missing");
  const pre = PRE_TOKENIZERS.get(name);
  if (pre === undefined) throw fields.unsupported("tokenizer.ggml.pre", name, [...PRE_TOKENIZERS.keys()].join(", "));
  const merges = fields.texts("tokenizer.ggml.merges");
  const begin = beginProcessor(vocabulary);
  const trim = { type: "ByteLevel", add_prefix_space: true, trim_offsets: false, use_regex: true };
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: addedTokens(vocabulary),
    normalizer: null,
    pre_tokenizer: { type: "Sequence", pretokenizers: pre.steps },
    post_processor: begin ?? trim,
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: pre.ignoreMerges ?? false,
      vocab: Object.fromEntries(vocabulary.tokens.map((token, id) => [token, id])),
      merges,
    },
  };
}
