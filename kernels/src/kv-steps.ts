/**
 * What one step asks of the KV kernels, turned into the small tables that they read: rows, query tiles, windows to seal.
 * Everything is filled into typed arrays made once.
 */
import { type KvFormat, type KvShape, validateKv } from "./kv-format.ts";

/** Part of a prompt. Its rows follow those of the chunk before it. */
export interface PrefillChunk {
  /** Row of the page table and of the residual buffer. */
  readonly slot: number;
  /** Position of the first token: a multiple of residualTokens. */
  readonly position: number;
  readonly tokens: number;
}

/** One sequence's next token. */
export interface DecodeRow {
  readonly slot: number;
  readonly position: number;
}

/** A full residual window to seal: tokens position .. position + residualTokens - 1. */
export interface SealWindow {
  readonly slot: number;
  /** Position of the window's first token: a multiple of residualTokens. */
  readonly position: number;
}

/** What `KvLayer.encodePrefill` needs to know; from `KvKernels.preparePrefill`. */
export interface PrefillPlan {
  readonly rows: number;
  readonly tiles: number;
  /** Blocks that this phase completes; their pages must be in the page table. */
  readonly blocks: number;
}

/** What `KvLayer.encodeDecode` needs to know; from `KvKernels.prepareDecode`. */
export interface DecodePlan {
  readonly rows: number;
  /** Sealed tokens of the longest row. */
  readonly sealed: number;
  /** Steps since the row table was written: every row's position has moved on by as many. */
  readonly step: number;
}

/** What `KvLayer.encodeSeal` needs to know; from `KvKernels.prepareSeal`. */
export interface SealPlan {
  readonly blocks: number;
  /** Entry of the seal table where the plan's blocks begin. */
  readonly first: number;
}

/** One of several decode steps that follow each other without the host; from `KvKernels.prepareDecodeSteps`. */
export interface DecodeStepPlan {
  readonly attend: DecodePlan;
  /** Windows that the step fills: to seal after all its layers. It may hold no blocks. */
  readonly seal: SealPlan;
}

/** Words of one entry of the row table: position, slot, flags, unused. */
export const ROW_WORDS = 4;
/** Row flag: the token stays unsealed after this phase, so its K and V go to the residual too. */
export const ROW_RESIDUAL = 1;
/** Words of one entry of the tile table: first row, rows, position of the first row, slot. */
export const TILE_WORDS = 4;
/** Words of one entry of the seal table: first source token, slot, position of the block, unused. */
export const SEAL_WORDS = 4;

export interface KvStepLimits {
  readonly format: KvFormat;
  readonly shape: KvShape;
  readonly maxRows: number;
  readonly maxDecodeRows: number;
  /** Decode steps that one set of tables may serve. Default: 1. */
  readonly maxDecodeSteps?: number;
  readonly maxSlots: number;
  readonly maxPositions: number;
  /** Query rows of one prefill attention tile. */
  readonly tileRows: number;
}

/** The tables of one step, on the host. */
export interface KvStepTables {
  readonly prefillRows: Uint32Array<ArrayBuffer>;
  readonly prefillTiles: Uint32Array<ArrayBuffer>;
  readonly prefillSeals: Uint32Array<ArrayBuffer>;
  readonly decodeRows: Uint32Array<ArrayBuffer>;
  readonly decodeSeals: Uint32Array<ArrayBuffer>;
  /** Fills the prefill tables. @throws RangeError for a chunk that does not start at a window or exceeds a limit. */
  fillPrefill(chunks: readonly PrefillChunk[]): PrefillPlan;
  /** Fills the row table for the first step, and the seal table for all of them. */
  fillDecodeSteps(rows: readonly DecodeRow[], steps: number): readonly DecodeStepPlan[];
  fillSeal(windows: readonly SealWindow[]): SealPlan;
}

/** Makes the tables for the given limits. @throws RangeError where format and shape do not fit. */
export function createKvStepTables(limits: KvStepLimits): KvStepTables {
  validateKv(limits.format, limits.shape);
  const { maxRows, maxDecodeRows, maxDecodeSteps = 1, shape } = limits;
  // A tile has at least one row.
  const prefillRows = new Uint32Array(Math.max(1, maxRows) * ROW_WORDS);
  const prefillTiles = new Uint32Array(Math.max(1, maxRows) * TILE_WORDS);
  const prefillSeals = new Uint32Array(Math.max(1, Math.floor(maxRows / shape.blockTokens)) * SEAL_WORDS);
  const decodeRows = new Uint32Array(Math.max(1, maxDecodeRows) * ROW_WORDS);
  const blocksPerWindow = shape.residualTokens / shape.blockTokens;
  const windows = Math.max(1, maxDecodeRows) * Math.ceil(maxDecodeSteps / shape.residualTokens);
  const decodeSeals = new Uint32Array(windows * blocksPerWindow * SEAL_WORDS);
  return {
    prefillRows,
    prefillTiles,
    prefillSeals,
    decodeRows,
    decodeSeals,
    fillPrefill: (chunks) => fillPrefill(limits, chunks, prefillRows, prefillTiles, prefillSeals),
    fillDecodeSteps: (rows, steps) => fillDecodeSteps(limits, rows, steps, decodeRows, decodeSeals),
    fillSeal: (windows) => fillSeal(limits, windows, decodeSeals),
  };
}

function checkRow(limits: KvStepLimits, what: string, slot: number, position: number, tokens: number): void {
  if (!Number.isInteger(slot) || slot < 0 || slot >= limits.maxSlots) {
    throw new RangeError(`${what}: slot ${slot} is not in 0..${limits.maxSlots - 1}`);
  }
  if (!Number.isInteger(position) || position < 0 || !Number.isInteger(tokens) || tokens <= 0) {
    throw new RangeError(`${what}: position ${position} and token count ${tokens} must be integers, at least 0 and 1`);
  }
  if (position + tokens > limits.maxPositions) {
    throw new RangeError(`${what}: position ${position + tokens - 1} is over the last, ${limits.maxPositions - 1}`);
  }
}

function checkWindowStart(limits: KvStepLimits, what: string, position: number): void {
  const window = limits.shape.residualTokens;
  if (position % window !== 0) throw new RangeError(`${what}: position ${position} is not a multiple of ${window}`);
}

function fillPrefill(
  limits: KvStepLimits,
  chunks: readonly PrefillChunk[],
  rowTable: Uint32Array,
  tileTable: Uint32Array,
  sealTable: Uint32Array,
): PrefillPlan {
  const { residualTokens: window, blockTokens } = limits.shape;
  let row = 0;
  let tiles = 0;
  let blocks = 0;
  for (const { slot, position, tokens } of chunks) {
    checkRow(limits, "prefill chunk", slot, position, tokens);
    checkWindowStart(limits, "prefill chunk", position);
    if (row + tokens > limits.maxRows) throw new RangeError(`prefill: over ${limits.maxRows} rows`);
    const end = position + tokens;
    const frontier = end - (end % window);
    for (let i = 0; i < tokens; i++) {
      rowTable.set([position + i, slot, position + i >= frontier ? ROW_RESIDUAL : 0, 0], (row + i) * ROW_WORDS);
    }
    for (let first = 0; first < tokens; ) {
      const left = Math.min(tokens - first, window - (first % window), limits.tileRows);
      tileTable.set([row + first, left, position + first, slot], tiles * TILE_WORDS);
      tiles++;
      first += left;
    }
    for (let block = position; block < frontier; block += blockTokens) {
      sealTable.set([row + block - position, slot, block, 0], blocks * SEAL_WORDS);
      blocks++;
    }
    row += tokens;
  }
  return { rows: row, tiles, blocks };
}

function fillDecodeSteps(
  limits: KvStepLimits,
  rows: readonly DecodeRow[],
  steps: number,
  rowTable: Uint32Array,
  sealTable: Uint32Array,
): readonly DecodeStepPlan[] {
  const { maxDecodeRows, maxDecodeSteps = 1, shape } = limits;
  const window = shape.residualTokens;
  if (rows.length > maxDecodeRows) throw new RangeError(`decode: ${rows.length} rows, at most ${maxDecodeRows}`);
  if (!Number.isInteger(steps) || steps < 1 || steps > maxDecodeSteps) {
    throw new RangeError(`decode: ${steps} steps, must be 1..${maxDecodeSteps}`);
  }
  let longest = 0;
  rows.forEach(({ slot, position }, row) => {
    checkRow(limits, "decode row", slot, position, steps);
    longest = Math.max(longest, position);
    rowTable.set([position, slot, ROW_RESIDUAL, 0], row * ROW_WORDS);
  });
  let blocks = 0;
  return Array.from({ length: steps }, (_, step) => {
    const first = blocks;
    for (const { slot, position } of rows) {
      const end = position + step + 1;
      if (end % window === 0) blocks = addWindow(shape, sealTable, blocks, { slot, position: end - window });
    }
    const last = longest + step;
    return {
      attend: { rows: rows.length, sealed: rows.length === 0 ? 0 : last - (last % window), step },
      seal: { blocks: blocks - first, first },
    };
  });
}

/** Appends a window's blocks to a seal table that holds `blocks`. @returns how many it then holds. */
function addWindow(shape: KvShape, table: Uint32Array, blocks: number, { slot, position }: SealWindow): number {
  let count = blocks;
  for (let token = 0; token < shape.residualTokens; token += shape.blockTokens) {
    table.set([token, slot, position + token, 0], count * SEAL_WORDS);
    count++;
  }
  return count;
}

function fillSeal(limits: KvStepLimits, windows: readonly SealWindow[], table: Uint32Array): SealPlan {
  const window = limits.shape.residualTokens;
  if (windows.length > limits.maxDecodeRows) {
    throw new RangeError(`seal: ${windows.length} windows, at most ${limits.maxDecodeRows}`);
  }
  let blocks = 0;
  for (const { slot, position } of windows) {
    checkRow(limits, "window to seal", slot, position, window);
    checkWindowStart(limits, "window to seal", position);
    blocks = addWindow(limits.shape, table, blocks, { slot, position });
  }
  return { blocks, first: 0 };
}
