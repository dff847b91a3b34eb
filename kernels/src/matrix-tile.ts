/** Tiles of rows × outputs that one workgroup of a matrix kernel computes. */
import { MATRIX_SIZE, MATRIX_THREADS } from "./subgroup-matrix.ts";

/** Shape of a workgroup's tile: subgroups, and 16 × 16 sums that each of them holds in registers. */
export interface MatrixTile {
  readonly subgroupsM: number;
  readonly subgroupsN: number;
  readonly tilesM: number;
  /** A power of two from 2: with `silu-mul` half of them are gates. */
  readonly tilesN: number;
}

/** Rows of a tile. */
export function tileRows(tile: MatrixTile): number {
  return tile.subgroupsM * tile.tilesM * MATRIX_SIZE;
}

/** Weight rows of a tile; with `silu-mul` half of them are gates. */
export function tileOutputs(tile: MatrixTile): number {
  return tile.subgroupsN * tile.tilesN * MATRIX_SIZE;
}

/** Threads that own a tile. */
export function tileThreads(tile: MatrixTile): number {
  return tile.subgroupsM * tile.subgroupsN * MATRIX_THREADS;
}
