import type { TokenPiece } from "./token-pieces.ts";

/**
 * Turns the tokens of one answer into text as they come. Every returned piece is whole characters; the bytes of an
 * unfinished one (at most three) wait for the next token. The pieces joined are the text of all tokens decoded at once.
 */
export class Detokenizer {
  private readonly pieceOf: (id: number) => TokenPiece | undefined;
  // A byte-order mark inside an answer is text like any other.
  private readonly decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  /** `pieceOf` gives undefined for tokens without text: special ones and ids outside the vocabulary. */
  constructor(pieceOf: (id: number) => TokenPiece | undefined) {
    this.pieceOf = pieceOf;
  }

  /** The text that `id` completes; "" where it only begins or continues a character. */
  push(id: number): string {
    const piece = this.pieceOf(id);
    if (piece === undefined) {
      return "";
    }
    if ("bytes" in piece) {
      return this.decoder.decode(piece.bytes, { stream: true });
    }
    return this.decoder.decode() + piece.text;
  }

  /** The end: an unfinished character becomes U+FFFD. */
  finish(): string {
    return this.decoder.decode();
  }
}
