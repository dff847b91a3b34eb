/** A fetch rate older than this is unknown again: one bad fetch must not end fetching for good. */
export const fetchRateLifeSeconds = 30;

/** What is known about the two ways to get the KV of a missing prefix. Rates of 0 are not known yet. */
export interface FetchEstimate {
  readonly tokens: number;
  readonly bytes: number;
  readonly prefillTokensPerSecond: number;
  readonly fetchBytesPerSecond: number;
  /** Since the newest measurement of `fetchBytesPerSecond`. */
  readonly fetchRateAgeSeconds: number;
  /** Of a fetch, besides its bytes. */
  readonly fetchSeconds: number;
}

/** Whether to fetch rather than recompute: always while a rate is unknown or old, so that it becomes known. */
export function worthFetching(estimate: FetchEstimate): boolean {
  const { prefillTokensPerSecond, fetchBytesPerSecond } = estimate;
  if (prefillTokensPerSecond <= 0 || fetchBytesPerSecond <= 0) return true;
  if (estimate.fetchRateAgeSeconds >= fetchRateLifeSeconds) return true;
  const fetching = estimate.fetchSeconds + estimate.bytes / fetchBytesPerSecond;
  return fetching < estimate.tokens / prefillTokensPerSecond;
}

/** A rate that follows its measurements: the newest counts one quarter. 0 until the first. */
export class MeasuredRate {
  #value = 0;

  get value(): number {
    return this.#value;
  }

  /** Ignores measurements without an amount or a time; tells whether this was one. */
  add(amount: number, seconds: number): boolean {
    if (!(amount > 0 && seconds > 0)) return false;
    const rate = amount / seconds;
    this.#value = this.#value === 0 ? rate : this.#value + (rate - this.#value) / 4;
    return true;
  }

  /** Back to unknown. */
  forget(): void {
    this.#value = 0;
  }
}
