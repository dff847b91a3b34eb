/** Seeded random numbers for fuzzed tests. A test prints its seed; `KIVIMESH_TEST_SEED` replays it. */

/** Mulberry32: 32 bits of state, full period, good enough to fuzz shapes and data. */
export class Random {
  readonly seed: number;
  #state: number;
  #spare: number | undefined;

  constructor(seed: number) {
    this.seed = seed >>> 0;
    this.#state = this.seed;
  }

  /** Uniform in 0 … 2³² − 1. */
  uint32(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let word = this.#state;
    word = Math.imul(word ^ (word >>> 15), word | 1);
    word ^= word + Math.imul(word ^ (word >>> 7), word | 61);
    return (word ^ (word >>> 14)) >>> 0;
  }

  /** Uniform in [low, high). */
  uniform(low = 0, high = 1): number {
    return low + (this.uint32() / 2 ** 32) * (high - low);
  }

  /** Integer, uniform, both ends included. */
  integer(low: number, high: number): number {
    return low + Math.floor(this.uniform() * (high - low + 1));
  }

  /** Normal with the given mean and deviation (Box–Muller). */
  normal(mean = 0, deviation = 1): number {
    if (this.#spare !== undefined) {
      const value = this.#spare;
      this.#spare = undefined;
      return mean + deviation * value;
    }
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    const angle = 2 * Math.PI * this.uniform();
    this.#spare = radius * Math.sin(angle);
    return mean + deviation * radius * Math.cos(angle);
  }

  /** One element of a non-empty list. */
  pick<T>(list: readonly T[]): T {
    if (list.length === 0) throw new RangeError("pick from an empty list");
    return list[this.integer(0, list.length - 1)] as T;
  }

  normals(count: number, deviation = 1, mean = 0): Float32Array<ArrayBuffer> {
    const values = new Float32Array(count);
    for (let index = 0; index < count; index++) values[index] = this.normal(mean, deviation);
    return values;
  }

  bytes(count: number): Uint8Array<ArrayBuffer> {
    const values = new Uint8Array(count);
    for (let index = 0; index < count; index++) values[index] = this.uint32() & 255;
    return values;
  }
}

/** A generator whose seed is printed, so that a failure can be replayed with `KIVIMESH_TEST_SEED=<seed>`. */
export function seededRandom(name: string): Random {
  const fixed = process.env.KIVIMESH_TEST_SEED;
  const seed = fixed === undefined ? (Math.random() * 2 ** 32) >>> 0 : Number.parseInt(fixed, 10) >>> 0;
  process.stdout.write(`[${name}] KIVIMESH_TEST_SEED=${seed}\n`);
  return new Random(seed);
}
