/** What all kernels of decode splits share: immediates, and how queries of a KV head are tiled. */

/** Queries of a workgroup, and workgroups of a KV head: as equal as possible, at most `most` queries. */
export function queryTiles(queriesPerKvHead: number, most: number): { queries: number; tiles: number } {
  const tiles = Math.ceil(queriesPerKvHead / most);
  return { queries: Math.ceil(queriesPerKvHead / tiles), tiles };
}

/** Words of the immediate block: one, firstRow, step, splitTokens, splits, walk (consecutive splits of a workgroup). */
export const DECODE_SPLIT_IMMEDIATES = 6;

/** Text of the immediate block of all split kernels. */
export const DECODE_SPLIT_STEP = `
struct Step { one: u32, firstRow: u32, step: u32, splitTokens: u32, splits: u32, walk: u32 }
var<immediate> params: Step;`;
