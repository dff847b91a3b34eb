/** Requests whose attempts are remembered; older ones are forgotten first. */
const maxRememberedRequests = 4096;

interface Attempts {
  /** Highest epoch that was submitted; -1: none. */
  readonly submitted: number;
  /** Attempts up to this epoch are aborted; -1: none. */
  readonly abortedUpTo: number;
}

/** What becomes of a newly arrived attempt. */
export type Admission = "run" | "aborted" | "stale";

/** Remembers epochs, so that stale attempts do not run and an abort that overtakes its job still counts. Bounded. */
export class AttemptRegistry {
  readonly #attempts = new Map<string, Attempts>();
  readonly #limit: number;

  constructor(limit: number = maxRememberedRequests) {
    this.#limit = limit;
  }

  get size(): number {
    return this.#attempts.size;
  }

  /** Notes an attempt. `stale`: this or a later one was seen before. `aborted`: its abort was here first. */
  submit(requestId: string, epoch: number): Admission {
    const { submitted, abortedUpTo } = this.#of(requestId);
    if (epoch <= submitted) return "stale";
    this.#remember(requestId, { submitted: epoch, abortedUpTo });
    return epoch <= abortedUpTo ? "aborted" : "run";
  }

  /** Notes that attempts up to `epoch` are to end. */
  abort(requestId: string, epoch: number): void {
    const { submitted, abortedUpTo } = this.#of(requestId);
    this.#remember(requestId, { submitted, abortedUpTo: Math.max(abortedUpTo, epoch) });
  }

  #of(requestId: string): Attempts {
    return this.#attempts.get(requestId) ?? { submitted: -1, abortedUpTo: -1 };
  }

  #remember(requestId: string, attempts: Attempts): void {
    this.#attempts.delete(requestId);
    this.#attempts.set(requestId, attempts);
    if (this.#attempts.size <= this.#limit) return;
    for (const oldest of this.#attempts.keys()) {
      this.#attempts.delete(oldest);
      return;
    }
  }
}
