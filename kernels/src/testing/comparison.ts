/** Comparison of a kernel's output with its f64 reference: the mean error and the single worst element. */

export interface Comparison {
  /** Squared error over the reference's squared norm; 0 where both are zero. */
  readonly nmse: number;
  /** Largest |actual − expected|; infinite if an element is NaN or infinite where the reference is not. */
  readonly maxAbs: number;
  readonly worstIndex: number;
}

/** @throws RangeError where the lengths differ. */
export function compareArrays(actual: ArrayLike<number>, expected: ArrayLike<number>): Comparison {
  if (actual.length !== expected.length)
    throw new RangeError(`${actual.length} values against ${expected.length} expected`);
  let error = 0;
  let norm = 0;
  let maxAbs = 0;
  let worstIndex = 0;
  for (let index = 0; index < expected.length; index++) {
    const want = expected[index] as number;
    const difference = Math.abs((actual[index] as number) - want);
    const distance = Number.isFinite(difference) ? difference : Number.POSITIVE_INFINITY;
    if (distance > maxAbs) {
      maxAbs = distance;
      worstIndex = index;
    }
    error += distance * distance;
    norm += want * want;
  }
  return { nmse: error === 0 ? 0 : error / norm, maxAbs, worstIndex };
}

/** Bounds of `assertClose`: both must hold. */
export interface Tolerance {
  readonly nmse: number;
  readonly maxAbs: number;
}

/** @throws Error naming the context, both figures and the worst element. */
export function assertClose(
  context: string,
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  tolerance: Tolerance,
): Comparison {
  const result = compareArrays(actual, expected);
  if (!(result.nmse <= tolerance.nmse && result.maxAbs <= tolerance.maxAbs)) {
    const { worstIndex } = result;
    throw new Error(
      `${context}: nmse ${result.nmse.toExponential(2)} (≤ ${tolerance.nmse}), max abs ${result.maxAbs.toExponential(2)} ` +
        `(≤ ${tolerance.maxAbs}) at ${worstIndex}: got ${actual[worstIndex]}, expected ${expected[worstIndex]}`,
    );
  }
  return result;
}

/** @throws Error at the first element whose bits differ. */
export function assertSameBits(context: string, actual: Float32Array, expected: Float32Array): void {
  if (actual.length !== expected.length)
    throw new RangeError(`${context}: ${actual.length} values against ${expected.length}`);
  const left = new Uint32Array(actual.buffer, actual.byteOffset, actual.length);
  const right = new Uint32Array(expected.buffer, expected.byteOffset, expected.length);
  for (let index = 0; index < left.length; index++) {
    if (left[index] !== right[index]) {
      throw new Error(`${context}: bits differ at ${index}: ${actual[index]} against ${expected[index]}`);
    }
  }
}
