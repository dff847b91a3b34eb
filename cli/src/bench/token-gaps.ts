/** Times between the tokens of one sequence. Tokens that come together share the time since those before them. */
export class TokenGaps {
  readonly #gaps: number[];
  #before: number | undefined;
  #last: number | undefined;
  #count = 0;

  /** @param gaps gets a time for each token, when the next ones come. */
  constructor(gaps: number[]) {
    this.#gaps = gaps;
  }

  add(count: number, at: number): void {
    if (this.#last === at) {
      this.#count += count;
      return;
    }
    if (this.#before !== undefined && this.#last !== undefined) {
      const share = (this.#last - this.#before) / this.#count;
      for (let token = 0; token < this.#count; token++) this.#gaps.push(share);
    }
    this.#before = this.#last;
    this.#last = at;
    this.#count = count;
  }
}
