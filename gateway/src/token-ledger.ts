/** What a message of tokens means for its request. */
export type LedgerEntry =
  /** Tokens not seen before, in order (none, if all were repeats). */
  | { readonly kind: "fresh"; readonly ids: readonly number[] }
  /** Sent by an attempt that has been given up. */
  | { readonly kind: "stale" }
  /** Tokens before these never came: the attempt cannot be trusted any more. */
  | { readonly kind: "gap" };

/**
 * The completion tokens of one request over all its attempts. Each index enters once and in order, whatever is repeated,
 * late or from an attempt before: that is what "exactly once to the client" rests on.
 */
export class TokenLedger {
  private readonly received: number[] = [];
  private currentEpoch = 0;
  private attemptStart = 0;

  /** All tokens so far. */
  get tokens(): readonly number[] {
    return this.received;
  }

  /** The attempt whose messages count; 0 before the first. */
  get epoch(): number {
    return this.currentEpoch;
  }

  /** Begins the next attempt, which continues after the tokens so far. Returns its epoch. */
  beginAttempt(): number {
    this.attemptStart = this.received.length;
    this.currentEpoch += 1;
    return this.currentEpoch;
  }

  /** Enters `ids`, whose first has the index `index` among the tokens of attempt `epoch`. */
  enter(epoch: number, index: number, ids: readonly number[]): LedgerEntry {
    if (epoch !== this.currentEpoch) {
      return { kind: "stale" };
    }
    const missing = this.received.length - (this.attemptStart + index);
    if (missing < 0) {
      return { kind: "gap" };
    }
    const fresh = ids.slice(missing);
    this.received.push(...fresh);
    return { kind: "fresh", ids: fresh };
  }
}
