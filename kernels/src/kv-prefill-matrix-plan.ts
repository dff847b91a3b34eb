/** What the matrix kernel of prefill attention is generated from: its template, the sizes that follow, and who does what. */
import type { KvBits, KvFormat, KvShape } from "./kv-format.ts";
import { MATRIX_SIZE, MATRIX_THREADS } from "./subgroup-matrix.ts";

/** Tokens of one step of the loop over keys: one group of a page. */
export const KEY_TILE = 32;

/** How a workgroup shares its work. Queries of a workgroup: `tileRows * queryHeads`, ordered by head, then row. */
export interface PrefillMatrixPlan {
  /** Rows (positions) of a tile. */
  readonly tileRows: number;
  /** Query heads of one KV head that a workgroup takes: they share the unpacked keys and values. */
  readonly queryHeads: number;
  /** Matrices of 16 queries that a subgroup owns: 1, 2 or 4. */
  readonly rowBlocks: number;
  /** Subgroups side by side that share the same queries: each takes a part of the keys and of the output's channels. */
  readonly columnGroups: number;
  /** Where the queries stay: as matrices in registers (device only), or in workgroup memory. */
  readonly queries: "registers" | "shared";
  /**
   * When the words to stage are loaded: before the products, or where they are unpacked; mixed: codes before the products,
   * keys' scales (four times the registers) before the softmax.
   */
  readonly loads: "early" | "mixed" | "late";
}

/**
 * How workgroups share the work for a shape: 128 queries (64 where heads are small), of as many heads of a KV head as
 * divide them, and rows that do not cross a window. The choice depends on the model alone, never on a batch.
 * @returns undefined where matrices do not fit the head size.
 */
export function planPrefillMatrix(
  shape: KvShape,
  heads: number,
  dialect: "device" | "emulated",
): PrefillMatrixPlan | undefined {
  const { headDim, kvHeads, residualTokens } = shape;
  if (headDim % (2 * MATRIX_SIZE) !== 0 || headDim > 128) return undefined;
  const wanted = headDim > 64 ? 128 : 64;
  const group = heads / kvHeads;
  const fits = (count: number) => group % count === 0 && wanted % count === 0 && wanted / count >= MATRIX_SIZE;
  const queryHeads = [8, 4, 2].find(fits) ?? 1;
  const tileRows = Math.min(wanted / queryHeads, residualTokens);
  const device = dialect === "device";
  return {
    tileRows,
    queryHeads,
    rowBlocks: 2,
    columnGroups: 2,
    queries: device ? "registers" : "shared",
    loads: device ? "early" : "late",
  };
}

export interface PrefillMatrixTemplate {
  readonly format: KvFormat;
  readonly shape: KvShape;
  /** Query heads of the model. */
  readonly heads: number;
  /** Pages of one row of the page table. */
  readonly maxPages: number;
  /** Factor of the logits. */
  readonly scale: number;
  readonly plan: PrefillMatrixPlan;
  /** `emulated` runs anywhere, slowly. */
  readonly dialect: "device" | "emulated";
  /** Arithmetic that unpacks codes: f16 needs the feature `shader-f16`. */
  readonly arithmetic: "f16" | "f32";
  readonly output: "f32" | "f16";
}

/** Sizes that the generators share. */
export interface PrefillMatrixSizes {
  readonly d: number;
  /** Queries of a workgroup. */
  readonly queries: number;
  /** Queries of a subgroup. */
  readonly groupRows: number;
  /** Groups of `groupRows` queries. */
  readonly rowGroups: number;
  readonly threads: number;
  /** Threads that share a query in the softmax. */
  readonly rowThreads: number;
  /** vec4s of a row of keys, values or queries in workgroup memory, padding included. */
  readonly rowVectors: number;
  /** vec4s of a row of weights (softmax) in workgroup memory. */
  readonly weightVectors: number;
  /** vec4s of a row of logits. */
  readonly logitVectors: number;
  /** vec4s of a row of f32 queries or output. */
  readonly boardVectors: number;
  /** Matrices of keys (columns of the logits) of a subgroup. */
  readonly keyBlocks: number;
  /** Matrices of channels (columns of the output) of a subgroup. */
  readonly channelBlocks: number;
}

/** @throws RangeError where the plan does not fit the shape. */
export function prefillMatrixSizes({ plan, shape, heads, format }: PrefillMatrixTemplate): PrefillMatrixSizes {
  const d = shape.headDim;
  const { rowBlocks, columnGroups, queryHeads, tileRows } = plan;
  const queries = tileRows * queryHeads;
  const groupRows = rowBlocks * MATRIX_SIZE;
  const rowGroups = queries / groupRows;
  const threads = rowGroups * columnGroups * MATRIX_THREADS;
  const rowThreads = threads / queries;
  const sizes = {
    d,
    queries,
    groupRows,
    rowGroups,
    threads,
    rowThreads,
    rowVectors: d / 8 + 1,
    weightVectors: KEY_TILE / 8 + 1,
    logitVectors: KEY_TILE / 4 + 1,
    boardVectors: d / 4 + 1,
    keyBlocks: KEY_TILE / MATRIX_SIZE / columnGroups,
    channelBlocks: d / MATRIX_SIZE / columnGroups,
  };
  if (d % MATRIX_SIZE !== 0) throw new RangeError(`headDim ${d} is not a multiple of ${MATRIX_SIZE}`);
  if ((heads / shape.kvHeads) % queryHeads !== 0) {
    throw new RangeError(`${queryHeads} heads of a workgroup do not divide ${heads}/${shape.kvHeads}`);
  }
  for (const name of ["rowGroups", "rowThreads", "keyBlocks", "channelBlocks"] as const) {
    if (!Number.isInteger(sizes[name])) throw new RangeError(`prefill plan: ${name} is ${sizes[name]}`);
  }
  if (format.rotated && d < 32) throw new RangeError(`headDim ${d}: rotated formats need 32 or more`);
  return sizes;
}

/** Bytes of workgroup memory that the kernel takes. */
export function prefillMatrixMemory(template: PrefillMatrixTemplate): number {
  const s = prefillMatrixSizes(template);
  const queries = template.plan.queries === "shared" ? s.queries * s.rowVectors : 0;
  const vectors = 2 * KEY_TILE * s.rowVectors + queries + s.queries * s.weightVectors + boardLength(s);
  return vectors * 16;
}

/** vec4s of the array that holds logits, and f32 rows of one group of queries. */
export function boardLength(s: PrefillMatrixSizes): number {
  return Math.max(s.queries * s.logitVectors, s.groupRows * s.boardVectors);
}

/**
 * Text: channel at a place of a row in workgroup memory. Codes of a word are unpacked as pairs (i, i + half), and the
 * halves of a word of sixteen codes lie in two separate runs, so that threads write side by side.
 */
export function channelAt(bits: KvBits, d: number, place: string): string {
  if (bits === 16) return place;
  if (bits === 4) return `((${place} & ~7u) + ((${place} >> 1u) & 3u) + 4u * (${place} & 1u))`;
  const words = d / 16;
  return `(((${place} >> 3u) % ${words}u) * 16u + ((${place} >> 3u) / ${words}u) * 4u + ((${place} >> 1u) & 3u) + 8u * (${place} & 1u))`;
}

/** Text: place of a channel in a row in workgroup memory; inverse of {@link channelAt}. */
export function placeOf(bits: KvBits, d: number, channel: string): string {
  if (bits === 16) return channel;
  if (bits === 4) return `((${channel} & ~7u) + 2u * (${channel} & 3u) + ((${channel} >> 2u) & 1u))`;
  const words = d / 16;
  return `(8u * ((${channel} >> 4u) + ${words}u * ((${channel} >> 2u) & 1u)) + 2u * (${channel} & 3u) + ((${channel} >> 3u) & 1u))`;
}
