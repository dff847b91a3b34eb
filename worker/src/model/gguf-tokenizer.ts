/** A Hugging Face style tokenizer definition from the vocabulary that a GGUF file carries. */
import { bpeTokenizer } from "./bpe-tokenizer.ts";
import type { GgufFields } from "./gguf-config.ts";
import { type GgufVocabulary, TYPE_CONTROL } from "./gguf-vocabulary.ts";
import type { TokenizerDefinition } from "./loaded-model.ts";
import { sentencePieceTokenizer } from "./sentencepiece-tokenizer.ts";

/** Names under which models end an answer besides their `eos` token; taken only where they are control tokens. */
const END_NAMES = new Set([
  "<|im_end|>",
  "<|eot_id|>",
  "<|end_of_text|>",
  "<|endoftext|>",
  "<|end|>",
  "</s>",
  "<|eom_id|>",
]);

/** @throws ClusterError MODEL_UNSUPPORTED for vocabularies of another kind, MODEL_FILE_INVALID for missing fields. */
export function ggufTokenizer(fields: GgufFields): TokenizerDefinition {
  const kind = fields.text("tokenizer.ggml.model");
  if (kind !== "gpt2" && kind !== "llama") throw fields.unsupported("tokenizer.ggml.model", kind, "gpt2, llama");
  const tokens = fields.texts("tokenizer.ggml.tokens");
  const types = fields.has("tokenizer.ggml.token_type")
    ? fields.numbers("tokenizer.ggml.token_type")
    : new Array<number>(tokens.length).fill(1);
  if (types.length !== tokens.length) {
    throw fields.invalid("tokenizer.ggml.token_type", `${types.length} long`, `as long as the ${tokens.length} tokens`);
  }
  const vocabulary: GgufVocabulary = {
    tokens,
    types,
    beginTokenId: fields.number("tokenizer.ggml.bos_token_id", -1),
    endTokenId: fields.number("tokenizer.ggml.eos_token_id", -1),
    unknownTokenId: fields.number("tokenizer.ggml.unknown_token_id", -1),
    addBegin: fields.flag("tokenizer.ggml.add_bos_token", kind === "llama"),
  };
  const tokenizer = kind === "gpt2" ? bpeTokenizer(fields, vocabulary) : sentencePieceTokenizer(fields, vocabulary);
  const chatTemplate = fields.text("tokenizer.chat_template", "");
  return {
    tokenizerJson: JSON.stringify(tokenizer),
    tokenizerConfigJson: JSON.stringify(tokenizerConfig(vocabulary, chatTemplate)),
    chatTemplate,
    endTokenIds: endTokens(fields, vocabulary),
    beginTokenId: vocabulary.addBegin ? vocabulary.beginTokenId : -1,
  };
}

function tokenizerConfig(vocabulary: GgufVocabulary, chatTemplate: string): Record<string, unknown> {
  const { tokens } = vocabulary;
  return {
    tokenizer_class: "PreTrainedTokenizerFast",
    bos_token: tokens[vocabulary.beginTokenId] ?? null,
    eos_token: tokens[vocabulary.endTokenId] ?? null,
    unk_token: tokens[vocabulary.unknownTokenId] ?? null,
    add_bos_token: vocabulary.addBegin,
    clean_up_tokenization_spaces: false,
    ...(chatTemplate === "" ? {} : { chat_template: chatTemplate }),
  };
}

function endTokens(fields: GgufFields, { tokens, types, endTokenId }: GgufVocabulary): number[] {
  const ends = new Set<number>();
  for (const id of [endTokenId, fields.number("tokenizer.ggml.eot_token_id", -1)]) {
    if (id >= 0 && id < tokens.length) ends.add(id);
  }
  tokens.forEach((token, id) => {
    if (types[id] === TYPE_CONTROL && END_NAMES.has(token)) ends.add(id);
  });
  return [...ends].sort((a, b) => a - b);
}
