/** Which plain linear kernels a device gets: tile shapes per profile and phase. All variants of one phase give equal bits. */
import type { Gpu } from "./device.ts";
import { type ColumnsTile, linearColumnsWgsl } from "./linear-columns.wgsl.ts";
import { linearRowsDecodeWgsl, linearRowsPrefillWgsl, ROWS_PREFILL_TILE } from "./linear-rows.wgsl.ts";
import type { LinearWeight } from "./linear-weight.ts";

/** One kernel with the bindings input, codes, scales and output. */
export interface LinearVariant {
  readonly label: string;
  readonly code: string;
  grid(rows: number): readonly [number, number];
}

/** The kernels of one layer. */
export interface LinearVariants {
  readonly variants: readonly LinearVariant[];
  /** Index of the variant that takes a dispatch of so many rows. */
  choose(rows: number): number;
}

/** A variant of choice for dispatches of at most `rowsUpTo` rows. */
interface BoundedVariant extends LinearVariant {
  readonly rowsUpTo: number;
}

const COLUMN_TILES: readonly { readonly rowsUpTo: number; readonly tile: ColumnsTile }[] = [
  { rowsUpTo: 1, tile: { lanes: 8, tileRows: 1, tileColumns: 12 } },
  { rowsUpTo: Number.POSITIVE_INFINITY, tile: { lanes: 8, tileRows: 4, tileColumns: 8 } },
];

function columnsVariants(weight: LinearWeight, maxRows: number): BoundedVariant[] {
  const { encoding } = weight;
  const needed = COLUMN_TILES.filter((_, index) => index === 0 || maxRows > (COLUMN_TILES[index - 1]?.rowsUpTo ?? 0));
  return needed.map(({ rowsUpTo, tile }) => ({
    label: `linear ${encoding.format} ${encoding.scales} ${encoding.group} ${tile.tileRows}x${tile.tileColumns}`,
    code: linearColumnsWgsl(encoding, tile),
    rowsUpTo,
    grid: (rows) => [Math.ceil(weight.rows / (tile.lanes * tile.tileColumns)), Math.ceil(rows / tile.tileRows)],
  }));
}

const DECODE_ROWS: readonly number[] = [1, 4];

/** Outputs of one decode workgroup: few, so that small layers fill the GPU, unless the grid would pass 65535. */
function decodeOutputs(outputs: number): number {
  return outputs <= 4 * 65535 ? 4 : 8;
}

function rowsDecodeVariants(gpu: Gpu, weight: LinearWeight, maxRows: number): BoundedVariant[] {
  const { encoding } = weight;
  const outputs = decodeOutputs(weight.rows);
  return DECODE_ROWS.slice(0, maxRows > 1 ? 2 : 1).map((rows) => ({
    label: `linear decode ${encoding.format} ${encoding.scales} ${encoding.group} x${rows}`,
    code: linearRowsDecodeWgsl(encoding, { outputs, rows }, gpu.features.subgroups),
    rowsUpTo: rows,
    grid: (count) => [Math.ceil(weight.rows / outputs), Math.ceil(count / rows)],
  }));
}

function rowsPrefillVariant(weight: LinearWeight): BoundedVariant {
  const { encoding } = weight;
  return {
    label: `linear prefill ${encoding.format} ${encoding.scales} ${encoding.group}`,
    code: linearRowsPrefillWgsl(encoding),
    rowsUpTo: Number.POSITIVE_INFINITY,
    grid: (count) => [Math.ceil(weight.rows / ROWS_PREFILL_TILE), Math.ceil(count / ROWS_PREFILL_TILE)],
  };
}

/** The last variant takes all that is larger. */
function byRows(variants: readonly BoundedVariant[]): LinearVariants {
  return {
    variants,
    choose(rows) {
      const index = variants.findIndex(({ rowsUpTo }) => rows <= rowsUpTo);
      return index < 0 ? variants.length - 1 : index;
    },
  };
}

/**
 * Kernels with f32 inputs.
 * @throws RangeError for a weight laid out for another profile.
 */
export function linearVariants(
  gpu: Gpu,
  weight: LinearWeight,
  phase: "prefill" | "decode",
  maxRows: number,
): LinearVariants {
  if ((gpu.profile === "software") !== (weight.layout === "columns")) {
    throw new RangeError(`${weight.label}: layout ${weight.layout} does not belong to profile ${gpu.profile}`);
  }
  if (weight.layout === "columns") return byRows(columnsVariants(weight, maxRows));
  return byRows(phase === "prefill" ? [rowsPrefillVariant(weight)] : rowsDecodeVariants(gpu, weight, maxRows));
}
