/** The vocabulary of a GGUF file, and the parts of tokenizer.json that follow from it alone. */

/** What both kinds of vocabulary share. */
export interface GgufVocabulary {
  readonly tokens: readonly string[];
  /** GGUF token types: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte. */
  readonly types: readonly number[];
  readonly beginTokenId: number;
  readonly endTokenId: number;
  readonly unknownTokenId: number;
  readonly addBegin: boolean;
}

export interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
  readonly single_word: false;
  readonly lstrip: false;
  readonly rstrip: false;
  readonly normalized: false;
}

export const TYPE_CONTROL = 3;
const TYPE_USER_DEFINED = 4;

/** Tokens that are matched in the text before anything else. Control tokens are hidden when decoding. */
export function addedTokens({ tokens, types }: GgufVocabulary): AddedToken[] {
  const added: AddedToken[] = [];
  tokens.forEach((content, id) => {
    const type = types[id];
    if (type !== TYPE_CONTROL && type !== TYPE_USER_DEFINED) return;
    const special = type === TYPE_CONTROL;
    added.push({ id, content, special, single_word: false, lstrip: false, rstrip: false, normalized: false });
  });
  return added;
}

/** Puts the begin token before every text, in the layout of tokenizer.json; null where the model adds none. */
export function beginProcessor({ tokens, beginTokenId, addBegin }: GgufVocabulary): Record<string, unknown> | null {
  const begin = tokens[beginTokenId];
  if (!addBegin || begin === undefined) return null;
  const special = { SpecialToken: { id: begin, type_id: 0 } };
  const first = { Sequence: { id: "A", type_id: 0 } };
  const second = { Sequence: { id: "B", type_id: 1 } };
  return {
    type: "TemplateProcessing",
    single: [special, first],
    pair: [special, first, { SpecialToken: { id: begin, type_id: 1 } }, second],
    special_tokens: { [begin]: { id: begin, ids: [beginTokenId], tokens: [begin] } },
  };
}
