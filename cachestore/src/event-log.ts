import type { BlockEvent, FollowedEvent } from "./block-store.ts";

/** Events kept for replay. */
const keptEvents = 65_536;

/** The latest changes, numbered without gaps, for any number of followers at their own pace. */
export class EventLog {
  readonly #limit: number;
  readonly #events: BlockEvent[] = [];
  #lastNumber: bigint;
  readonly #waiting = new Set<() => void>();

  /** Continues after `lastNumber`. */
  constructor(lastNumber: bigint, limit: number = keptEvents) {
    this.#lastNumber = lastNumber;
    this.#limit = limit;
  }

  get lastNumber(): bigint {
    return this.#lastNumber;
  }

  append(kind: BlockEvent["kind"], blockId: Uint8Array, parentId: Uint8Array): void {
    this.#lastNumber++;
    this.#events.push({ number: this.#lastNumber, kind, blockId, parentId });
    // Cut in large steps, so that a full log costs little for each event.
    if (this.#events.length > 2 * this.#limit) {
      this.#events.splice(0, this.#events.length - this.#limit);
    }
    for (const wake of this.#waiting) {
      wake();
    }
    this.#waiting.clear();
  }

  /**
   * Events after number `after`, then new ones. If those are not kept (any more), or the follower fell too far behind:
   * `cleared`, then a `stored` for all that `snapshot` names, then new ones. 0 follows from now on.
   */
  async *follow(
    after: bigint,
    signal: AbortSignal,
    snapshot: () => Iterable<{ blockId: Uint8Array; parentId: Uint8Array }>,
  ): AsyncGenerator<FollowedEvent> {
    let seen = after === 0n ? this.#lastNumber : after;
    while (!signal.aborted) {
      if (seen < this.#firstNumber - 1n || seen > this.#lastNumber) {
        seen = this.#lastNumber;
        const held = [...snapshot()];
        yield { number: seen, kind: "cleared" };
        for (const block of held) {
          yield { number: seen, kind: "stored", ...block };
        }
      } else if (seen < this.#lastNumber) {
        const event = this.#events[Number(seen + 1n - this.#firstNumber)];
        if (event !== undefined) {
          seen = event.number;
          yield event;
        }
      } else {
        await this.#changed(signal);
      }
    }
  }

  /** Number of the oldest kept event, or of the next one. */
  get #firstNumber(): bigint {
    return this.#events[0]?.number ?? this.#lastNumber + 1n;
  }

  #changed(signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const wake = () => {
        signal.removeEventListener("abort", wake);
        this.#waiting.delete(wake);
        resolve();
      };
      this.#waiting.add(wake);
      signal.addEventListener("abort", wake);
    });
  }
}
