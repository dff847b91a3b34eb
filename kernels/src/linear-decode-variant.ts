/**
 * Which kernels decode rows get where inputs are f16. All matrix variants give equal bits; with `fast` numerics one or two
 * rows take the vector kernel instead.
 */
import type { Gpu } from "./device.ts";
import type { LinearDescriptor } from "./linear.ts";
import {
  decodeTileOutputs,
  decodeTileRows,
  linearMatrixDecodeWgsl,
  type MatrixDecodeTile,
} from "./linear-matrix-decode.wgsl.ts";
import type { LinearVariant, LinearVariants } from "./linear-variant.ts";
import { linearVectorWgsl, type VectorTile, vectorTileOutputs } from "./linear-vector.wgsl.ts";
import { matrixDialect } from "./subgroup-matrix.ts";
import type { WeightFormat } from "./weight-encoding.ts";

/** A variant of choice for dispatches of at most `rowsUpTo` rows. */
interface BoundedVariant extends LinearVariant {
  readonly rowsUpTo: number;
}

interface BoundedTile {
  readonly rowsUpTo: number;
  readonly tile: MatrixDecodeTile;
}

/** Outputs from which wide tiles fill the GPU; below it narrower ones do. */
const MANY_OUTPUTS = 8192;

function matrixTile(
  subgroupsM: number,
  subgroupsN: number,
  tilesM: number,
  tilesN: number,
  depth: MatrixDecodeTile["depth"],
): MatrixDecodeTile {
  return { subgroupsM, subgroupsN, tilesM, tilesN, depth, ahead: 1 };
}

/**
 * Measured on an H200: docs/decode-linear.md. A multiprocessor holds some 55 KB of workgroup memory, so few rows take
 * small workgroups of which it holds several, and many rows take one large workgroup a multiprocessor. Loops without
 * barriers were 8 to 17 % faster for few rows; WGSL calls them a data race, so none is chosen.
 */
const WIDE_TILES: readonly BoundedTile[] = [
  { rowsUpTo: 16, tile: matrixTile(1, 2, 1, 1, 64) },
  { rowsUpTo: 32, tile: matrixTile(2, 2, 1, 3, 64) },
  { rowsUpTo: 64, tile: matrixTile(2, 2, 2, 3, 64) },
  { rowsUpTo: Number.POSITIVE_INFINITY, tile: matrixTile(2, 2, 4, 3, 32) },
];

const NARROW_TILES: readonly BoundedTile[] = [
  { rowsUpTo: 16, tile: matrixTile(1, 1, 1, 1, 128) },
  { rowsUpTo: 32, tile: matrixTile(2, 1, 1, 2, 128) },
  { rowsUpTo: 64, tile: matrixTile(2, 2, 2, 1, 64) },
  { rowsUpTo: Number.POSITIVE_INFINITY, tile: matrixTile(4, 1, 2, 2, 64) },
];

/** Small enough for software drivers to compile. */
const EMULATED_TILES: readonly BoundedTile[] = [
  { rowsUpTo: 16, tile: { subgroupsM: 1, subgroupsN: 1, tilesM: 1, tilesN: 1, depth: 64, ahead: 1 } },
  {
    rowsUpTo: Number.POSITIVE_INFINITY,
    tile: { subgroupsM: 2, subgroupsN: 1, tilesM: 1, tilesN: 1, depth: 32, ahead: 1 },
  },
];

function matrixVariant(gpu: Gpu, descriptor: LinearDescriptor, { rowsUpTo, tile }: BoundedTile): BoundedVariant {
  const { weight, accumulate, epilogue = "none", dialect = "device" } = descriptor;
  const { encoding, rows: outputs, columns } = weight;
  return {
    label: `linear matrix decode ${encoding.format} ${encoding.scales} ${encoding.group} ${columns} to ${outputs} ${epilogue} ${decodeTileRows(tile)}x${decodeTileOutputs(tile)}`,
    code: linearMatrixDecodeWgsl({
      encoding,
      tile,
      epilogue,
      accumulate,
      outputs,
      columns,
      dialect: matrixDialect(dialect),
      shaderF16: gpu.features.shaderF16,
      ...(dialect === "device" ? {} : { unrolled: 1 }),
    }),
    rowsUpTo,
    grid: (rows) => [Math.ceil(outputs / decodeTileOutputs(tile)), Math.ceil(rows / decodeTileRows(tile))],
  };
}

/** Measured on an H200: docs/decode-linear.md. */
const VECTOR_TILE: VectorTile = { outputs: 2, loads: 2, subgroups: 4 };

/** Rows that vector kernels are made for; from there on matrices are faster. */
function vectorRows(format: WeightFormat): readonly number[] {
  return format === "q8" || format === "q4" ? [1, 2] : [1];
}

function vectorVariant(gpu: Gpu, descriptor: LinearDescriptor, rows: number): BoundedVariant {
  const { weight, epilogue = "none" } = descriptor;
  const { encoding, rows: outputs, columns } = weight;
  const tile = VECTOR_TILE;
  const features = epilogue === "silu-mul" ? outputs / 2 : outputs;
  return {
    label: `linear vector ${encoding.format} ${encoding.scales} ${encoding.group} ${columns} to ${outputs} ${epilogue} x${rows}`,
    code: linearVectorWgsl({
      encoding,
      tile,
      rows,
      outputs,
      columns,
      epilogue,
      lanes: gpu.features.subgroupSize,
      shaderF16: gpu.features.shaderF16,
    }),
    rowsUpTo: rows,
    grid: () => [Math.ceil(features / vectorTileOutputs(tile, epilogue)), 1],
  };
}

/**
 * Kernels of decode rows with f16 inputs, in the order of rows that they take.
 * @param many takes dispatches of at least `rows` rows, if they can occur; with the same bits.
 */
export function linearDecodeVariants(
  gpu: Gpu,
  descriptor: LinearDescriptor,
  many?: { readonly rows: number; readonly variant: LinearVariant },
): LinearVariants {
  const { weight, maxRows, numerics = "invariant", dialect = "device" } = descriptor;
  const deviceTiles = weight.rows >= MANY_OUTPUTS ? WIDE_TILES : NARROW_TILES;
  const tiles = dialect === "emulated" ? EMULATED_TILES : deviceTiles;
  const vectors = numerics === "fast" && gpu.features.subgroups ? vectorRows(weight.format) : [];
  const bounded = [
    ...vectors.map((rows) => vectorVariant(gpu, descriptor, rows)),
    ...tiles.map((tile) => matrixVariant(gpu, descriptor, tile)),
  ];
  const needed = bounded.filter((_, index) => index === 0 || maxRows > (bounded[index - 1]?.rowsUpTo ?? 0));
  const last = many !== undefined && maxRows >= many.rows ? many : undefined;
  return {
    variants: last === undefined ? needed : [...needed, last.variant],
    choose(rows) {
      if (last !== undefined && rows >= last.rows) return needed.length;
      return needed.findIndex(({ rowsUpTo }) => rows <= rowsUpTo);
    },
  };
}
