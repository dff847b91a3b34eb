import { ClusterError } from "@kivimesh/proto";

/**
 * What one token adds to a text. `bytes` join with their neighbours' to characters; `text` stands alone, so that an
 * unfinished character before it is broken for good.
 */
export type TokenPiece = { readonly bytes: Uint8Array } | { readonly text: string };

interface DecoderConfig {
  type: string;
  decoders?: DecoderConfig[];
  pattern?: { String?: string; Regex?: string };
  content?: string;
  replacement?: string;
}

type PieceRule = (piece: TokenPiece) => TokenPiece;

/**
 * Builds the function from a vocabulary entry to its piece, out of the `decoder` section of a tokenizer.json.
 * A leading space that a decoder strips from the start of a text is kept: what is generated continues a prompt.
 * Throws MODEL_UNSUPPORTED where a decoder needs more than one token at a time (WordPiece, CTC, BPE with suffixes).
 */
export function tokenPieces(decoder: unknown): (token: string, added: boolean) => TokenPiece {
  if (decoder === null || typeof decoder !== "object") {
    throw new ClusterError("MODEL_UNSUPPORTED", "the tokenizer names no decoder");
  }
  const rules = flatten(decoder as DecoderConfig).map(rule);
  const byteLevel = flatten(decoder as DecoderConfig).some((step) => step.type === "ByteLevel");
  return (token, added) => {
    if (added && byteLevel) {
      return { text: token };
    }
    return rules.reduce<TokenPiece>((piece, apply) => apply(piece), { text: token });
  };
}

function flatten(decoder: DecoderConfig): DecoderConfig[] {
  return decoder.type === "Sequence" ? (decoder.decoders ?? []).flatMap(flatten) : [decoder];
}

function rule(step: DecoderConfig): PieceRule {
  switch (step.type) {
    case "ByteLevel":
      return onText((text) => ({ bytes: byteLevelBytes(text) }));
    case "ByteFallback":
      return onText((text) => {
        const code = /^<0x([0-9A-Fa-f]{2})>$/.exec(text)?.[1];
        return code === undefined ? { text } : { bytes: Uint8Array.of(Number.parseInt(code, 16)) };
      });
    case "Metaspace":
      return onText((text) => ({ text: text.replaceAll(step.replacement ?? "\u2581", " ") }));
    case "Replace": {
      const pattern = step.pattern?.String;
      if (pattern === undefined) {
        throw new ClusterError("MODEL_UNSUPPORTED", "the tokenizer's decoder replaces by a regular expression");
      }
      return onText((text) => ({ text: text.replaceAll(pattern, step.content ?? "") }));
    }
    // Both concern a text's start or its assembly, not single tokens.
    case "Fuse":
    case "Strip":
      return (piece) => piece;
    default:
      throw new ClusterError("MODEL_UNSUPPORTED", `the tokenizer's decoder "${step.type}" is not supported`);
  }
}

function onText(apply: (text: string) => TokenPiece): PieceRule {
  return (piece) => ("text" in piece ? apply(piece.text) : piece);
}

/**
 * Byte-level BPE writes each byte as one printable character: printable Latin-1 stands for itself, the other 68 bytes
 * are numbered from U+0100 in byte order (GPT-2's table).
 */
const byteOfCharacter: ReadonlyMap<string, number> = new Map(
  Array.from({ length: 256 }, (_, byte) => byte).reduce<[string, number][]>((table, byte) => {
    const unprintable = table.filter(([character]) => (character.codePointAt(0) ?? 0) >= 0x100).length;
    table.push([String.fromCodePoint(isPrintable(byte) ? byte : 0x100 + unprintable), byte]);
    return table;
  }, []),
);

function isPrintable(byte: number): boolean {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

function byteLevelBytes(token: string): Uint8Array {
  const bytes: number[] = [];
  for (const character of token) {
    const byte = byteOfCharacter.get(character);
    if (byte === undefined) {
      bytes.push(...Buffer.from(character, "utf8"));
    } else {
      bytes.push(byte);
    }
  }
  return Uint8Array.from(bytes);
}
