/** Grids of kernels that have one thread for each element. */

/** Threads of a workgroup in element-wise kernels. */
export const ELEMENT_THREADS = 64;

/** Workgroups that cover `width` elements in x and `rows` rows in y. */
export function elementGrid(width: number, rows: number): readonly [number, number] {
  return [Math.ceil(width / ELEMENT_THREADS), rows];
}

/** @throws RangeError unless `rows` is 1 … 65535, the most of one grid dimension. */
export function checkRows(label: string, rows: number): void {
  if (!Number.isInteger(rows) || rows < 1 || rows > 65535)
    throw new RangeError(`${label}: ${rows} rows, must be 1 … 65535`);
}
