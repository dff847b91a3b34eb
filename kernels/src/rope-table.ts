/** Cosines and sines of rotary position embedding, computed on the host in f64: angles of long contexts need it. */

/** How a model stretches its frequencies beyond the trained context. */
export type RopeScaling =
  | { readonly type: "linear"; readonly factor: number }
  | {
      /** Llama 3.1's piecewise scaling. */
      readonly type: "llama3";
      readonly factor: number;
      readonly lowFrequencyFactor: number;
      readonly highFrequencyFactor: number;
      readonly originalContext: number;
    };

export interface RopeTableOptions {
  /** Dimensions that turn; the whole head unless the model says less (even). */
  readonly ropeDim: number;
  /** Base of the frequencies, for example 10000. */
  readonly theta: number;
  readonly maxPositions: number;
  readonly scaling?: RopeScaling;
  /** Per-pair divisors of the frequencies (GGUF `rope_freqs.weight`), ropeDim / 2 of them. */
  readonly frequencyFactors?: ArrayLike<number>;
}

function llama3Frequency(frequency: number, scaling: Extract<RopeScaling, { type: "llama3" }>): number {
  const wavelength = (2 * Math.PI) / frequency;
  const { factor, lowFrequencyFactor: low, highFrequencyFactor: high, originalContext } = scaling;
  if (wavelength < originalContext / high) return frequency;
  if (wavelength > originalContext / low) return frequency / factor;
  const smooth = (originalContext / wavelength - low) / (high - low);
  return ((1 - smooth) * frequency) / factor + smooth * frequency;
}

/** Angular frequency of each rotated pair: f64 [ropeDim / 2]. */
export function ropeFrequencies(options: Omit<RopeTableOptions, "maxPositions">): Float64Array {
  const { ropeDim, theta, scaling, frequencyFactors } = options;
  if (ropeDim <= 0 || ropeDim % 2 !== 0) throw new RangeError(`ropeDim ${ropeDim} must be even and positive`);
  if (frequencyFactors !== undefined && frequencyFactors.length !== ropeDim / 2) {
    throw new RangeError(`${frequencyFactors.length} frequency factors for ${ropeDim / 2} pairs`);
  }
  return Float64Array.from({ length: ropeDim / 2 }, (_, pair) => {
    const frequency = theta ** ((-2 * pair) / ropeDim) / (frequencyFactors?.[pair] ?? 1);
    if (scaling === undefined) return frequency;
    return scaling.type === "linear" ? frequency / scaling.factor : llama3Frequency(frequency, scaling);
  });
}

/** f32 [maxPositions][ropeDim / 2][2]: cosine and sine of position * frequency. */
export function buildRopeTable(options: RopeTableOptions): Float32Array<ArrayBuffer> {
  const frequencies = ropeFrequencies(options);
  const pairs = frequencies.length;
  const table = new Float32Array(options.maxPositions * pairs * 2);
  for (let position = 0; position < options.maxPositions; position++) {
    for (let pair = 0; pair < pairs; pair++) {
      const angle = position * (frequencies[pair] as number);
      table[(position * pairs + pair) * 2] = Math.cos(angle);
      table[(position * pairs + pair) * 2 + 1] = Math.sin(angle);
    }
  }
  return table;
}
