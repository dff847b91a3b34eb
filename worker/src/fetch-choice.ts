/** What is known about the two ways to get the KV of a missing prefix. Rates of 0 are not known yet. */
export interface FetchEstimate {
  readonly tokens: number;
  readonly bytes: number;
  readonly prefillTokensPerSecond: number;
  readonly fetchBytesPerSecond: number;
  /** Of a fetch, besides its bytes. */
  readonly fetchSeconds: number;
}

/** Whether to fetch rather than recompute: always while a rate is unknown, so that it becomes known. */
export function worthFetching(estimate: FetchEstimate): boolean {
  const { prefillTokensPerSecond, fetchBytesPerSecond } = estimate;
  if (prefillTokensPerSecond <= 0 || fetchBytesPerSecond <= 0) return true;
  const fetching = estimate.fetchSeconds + estimate.bytes / fetchBytesPerSecond;
  return fetching < estimate.tokens / prefillTokensPerSecond;
}

/** A rate that follows its measurements: the newest counts one quarter. 0 until the first. */
export class MeasuredRate {
  #value = 0;

  get value(): number {
    return this.#value;
  }

  /** Ignores measurements without an amount or a time. */
  add(amount: number, seconds: number): void {
    if (!(amount > 0 && seconds > 0)) return;
    const rate = amount / seconds;
    this.#value = this.#value === 0 ? rate : this.#value + (rate - this.#value) / 4;
  }
}
