/** Which linear kernels a device gets: tile shapes per profile and phase. All variants of one phase give equal bits. */
import type { Gpu } from "./device.ts";
import { type ColumnsTile, linearColumnsWgsl } from "./linear-columns.wgsl.ts";
import type { LinearWeight } from "./linear-weight.ts";

export interface LinearVariant {
  readonly label: string;
  readonly code: string;
  /** The variant of choice for dispatches of at most so many rows. */
  readonly rowsUpTo: number;
  grid(rows: number): readonly [number, number];
}

const COLUMN_TILES: readonly { readonly rowsUpTo: number; readonly tile: ColumnsTile }[] = [
  { rowsUpTo: 1, tile: { lanes: 8, tileRows: 1, tileColumns: 4 } },
  { rowsUpTo: Number.POSITIVE_INFINITY, tile: { lanes: 8, tileRows: 8, tileColumns: 2 } },
];

function columnsVariants(weight: LinearWeight, maxRows: number, accumulate: boolean): LinearVariant[] {
  const { encoding } = weight;
  const needed = COLUMN_TILES.filter((_, index) => index === 0 || maxRows > (COLUMN_TILES[index - 1]?.rowsUpTo ?? 0));
  return needed.map(({ rowsUpTo, tile }) => ({
    label: `linear ${encoding.format} ${encoding.scales} ${encoding.group} ${tile.tileRows}x${tile.tileColumns}`,
    code: linearColumnsWgsl(encoding, tile, accumulate),
    rowsUpTo,
    grid: (rows) => [Math.ceil(weight.rows / (tile.lanes * tile.tileColumns)), Math.ceil(rows / tile.tileRows)],
  }));
}

/** Variants in the order of `rowsUpTo`; at least one. */
export function linearVariants(
  gpu: Gpu,
  weight: LinearWeight,
  _phase: "prefill" | "decode",
  maxRows: number,
  accumulate: boolean,
): readonly LinearVariant[] {
  if ((gpu.profile === "software") !== (weight.layout === "columns")) {
    throw new RangeError(`${weight.label}: layout ${weight.layout} does not belong to profile ${gpu.profile}`);
  }
  return columnsVariants(weight, maxRows, accumulate);
}
