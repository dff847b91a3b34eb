/**
 * tokenizer.json of SentencePiece BPE vocabularies (GGUF `tokenizer.ggml.model = llama`). GGUF keeps scores instead of
 * merges; a piece's score is its rank, so the merges follow from it.
 */
import type { GgufFields } from "./gguf-config.ts";
import { addedTokens, beginProcessor, type GgufVocabulary } from "./gguf-vocabulary.ts";

const SPACE = "\u2581";

interface Merge {
  readonly pair: readonly [string, string];
  readonly score: number;
  readonly left: number;
  readonly right: number;
}

/** All ways to make a piece of two others, best piece first, as the reference converter orders them. */
export function mergesOfScores(tokens: readonly string[], scores: readonly number[]): string[][] {
  const ids = new Map(tokens.map((token, id) => [token, id]));
  const merges: Merge[] = [];
  tokens.forEach((token, id) => {
    const letters = [...token];
    for (let cut = 1; cut < letters.length; cut++) {
      const pair = [letters.slice(0, cut).join(""), letters.slice(cut).join("")] as const;
      const left = ids.get(pair[0]);
      const right = ids.get(pair[1]);
      if (left !== undefined && right !== undefined) merges.push({ pair, score: scores[id] ?? 0, left, right });
    }
  });
  merges.sort((a, b) => b.score - a.score || a.left - b.left || a.right - b.right);
  return merges.map((merge) => [...merge.pair]);
}

/** @throws ClusterError MODEL_FILE_INVALID where scores are missing. */
export function sentencePieceTokenizer(fields: GgufFields, vocabulary: GgufVocabulary): Record<string, unknown> {
  const { tokens, unknownTokenId } = vocabulary;
  const merges = mergesOfScores(tokens, fields.numbers("tokenizer.ggml.scores"));
  const prefix = fields.flag("tokenizer.ggml.add_space_prefix", true);
  const replace = { type: "Replace", pattern: { String: " " }, content: SPACE };
  const strip = { type: "Strip", content: " ", start: 1, stop: 0 };
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: addedTokens(vocabulary),
    normalizer: {
      type: "Sequence",
      normalizers: [...(prefix ? [{ type: "Prepend", prepend: SPACE }] : []), replace],
    },
    pre_tokenizer: null,
    post_processor: beginProcessor(vocabulary),
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: SPACE }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        ...(prefix ? [strip] : []),
      ],
    },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: tokens[unknownTokenId] ?? null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      ignore_merges: false,
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges,
    },
  };
}
