/**
 * Which matrix kernels a layer gets: tiles by phase, shape and rows. All variants of one phase give equal bits: prefill
 * walks K in order, decode adds the sums of two halves of K.
 */
import type { Gpu } from "./device.ts";
import type { LinearDescriptor } from "./linear.ts";
import { linearDecodeVariants } from "./linear-decode-variant.ts";
import { linearMatrixPrefillWgsl } from "./linear-matrix-prefill.wgsl.ts";
import type { LinearVariant, LinearVariants } from "./linear-variant.ts";
import { type MatrixTile, tileOutputs, tileRows } from "./matrix-tile.ts";
import { matrixDialect } from "./subgroup-matrix.ts";

interface TileTable {
  /** For dispatches of at least a tile of rows. */
  readonly large: MatrixTile;
  /** For fewer rows, and where large tiles would leave most of the GPU idle. */
  readonly small: MatrixTile;
  /** Large tiles that fill the GPU. */
  readonly enough: number;
}

const DEVICE_TILES: TileTable = {
  large: { subgroupsM: 2, subgroupsN: 2, tilesM: 4, tilesN: 4 },
  small: { subgroupsM: 2, subgroupsN: 2, tilesM: 2, tilesN: 2 },
  enough: 80,
};

/** Small enough for software drivers to compile. */
const EMULATED_TILES: TileTable = {
  large: { subgroupsM: 1, subgroupsN: 2, tilesM: 1, tilesN: 2 },
  small: { subgroupsM: 1, subgroupsN: 1, tilesM: 1, tilesN: 2 },
  enough: 1,
};

function variantLabel({ weight, phase, epilogue = "none" }: LinearDescriptor, rows: number, outputs: number): string {
  const { encoding, columns, rows: n } = weight;
  return `linear matrix ${phase} ${encoding.format} ${encoding.scales} ${encoding.group} ${columns} to ${n} ${epilogue} ${rows}x${outputs}`;
}

interface TileUse {
  readonly tile: MatrixTile;
  readonly wholeRows: boolean;
  /** Columns of a step, where K allows. */
  readonly depth: 32 | 64;
}

function tiledVariant(gpu: Gpu, descriptor: LinearDescriptor, use: TileUse): LinearVariant {
  const { tile, wholeRows } = use;
  const { weight, phase, accumulate, epilogue = "none", dialect = "device" } = descriptor;
  const { encoding, rows: n, columns: k } = weight;
  const outputs = tileOutputs(tile);
  const slices = phase === "decode" ? 2 : 1;
  const code = linearMatrixPrefillWgsl({
    encoding,
    tile,
    slices,
    // Two slices of 64 columns of a large tile are more than the memory of a workgroup.
    depth: dialect === "device" && slices === 1 && k % 64 === 0 ? use.depth : 32,
    epilogue,
    accumulate,
    wholeRows,
    wholeOutputs: n >= outputs,
    // Software drivers compile for seconds: there shapes share a text.
    ...(dialect === "device" ? { shape: { outputs: n, columns: k } } : {}),
    dialect: matrixDialect(dialect),
    shaderF16: gpu.features.shaderF16,
  });
  return {
    label: variantLabel(descriptor, tileRows(tile), outputs),
    code,
    grid: (rows) => [Math.ceil(rows / tileRows(tile)), Math.ceil(n / outputs)],
  };
}

/** Fewest rows that large tiles are made for: as many as make enough of them. */
function largeRows({ weight }: LinearDescriptor, { large, enough }: TileTable): number {
  const needed = Math.ceil(enough / Math.ceil(weight.rows / tileOutputs(large)));
  return Math.max(tileRows(large), (needed - 1) * tileRows(large) + 1);
}

/** Rows from which f16 weights are staged in shorter steps: with many tiles two workgroups share a multiprocessor. */
const MANY_ROWS = 1024;

function prefillVariants(gpu: Gpu, descriptor: LinearDescriptor, tiles: TileTable): LinearVariants {
  const { weight, maxRows } = descriptor;
  const rows = largeRows(descriptor, tiles);
  const uses: { readonly from: number; readonly use: TileUse }[] = [
    { from: 1, use: { tile: tiles.small, wholeRows: false, depth: 64 } },
    { from: rows, use: { tile: tiles.large, wholeRows: true, depth: 64 } },
  ];
  if (weight.format === "f16") {
    uses.push({ from: Math.max(rows, MANY_ROWS), use: { tile: tiles.large, wholeRows: true, depth: 32 } });
  }
  const needed = uses.filter(({ from }) => from <= maxRows);
  return {
    variants: needed.map(({ use }) => tiledVariant(gpu, descriptor, use)),
    choose: (count) => needed.findLastIndex(({ from }) => from <= count),
  };
}

/** Rows from which large tiles take decode: with fewer, decode's own tiles need fewer rounds of the GPU. */
function manyRows(outputs: number): number {
  if (outputs >= 16384) return 129;
  return outputs >= 8192 ? 385 : 257;
}

function decodeVariants(gpu: Gpu, descriptor: LinearDescriptor, tiles: TileTable): LinearVariants {
  const { weight, maxRows, dialect = "device" } = descriptor;
  const least = dialect === "device" ? manyRows(weight.rows) : 1;
  const rows = Math.max(least, largeRows(descriptor, tiles));
  if (maxRows < rows) return linearDecodeVariants(gpu, descriptor);
  const variant = tiledVariant(gpu, descriptor, { tile: tiles.large, wholeRows: true, depth: 32 });
  return linearDecodeVariants(gpu, descriptor, { rows, variant });
}

function checkShape({ weight, accumulate, epilogue = "none" }: LinearDescriptor): void {
  const { label, rows, columns, layout } = weight;
  if (layout !== "rows") throw new RangeError(`${label}: layout ${layout}, matrix kernels read rows`);
  if (columns % 32 !== 0) throw new RangeError(`${label}: ${columns} columns, matrix kernels need a multiple of 32`);
  if (rows % 4 !== 0) throw new RangeError(`${label}: ${rows} outputs, matrix kernels need a multiple of 4`);
  if (epilogue !== "silu-mul") return;
  if (rows % 16 !== 0) throw new RangeError(`${label}: ${rows} gates and ups, must be a multiple of 16`);
  if (accumulate) throw new RangeError(`${label}: gated outputs do not accumulate`);
}

/**
 * Kernels with f16 inputs.
 * @throws RangeError where the device has no matrices (dialect `device`), or for shapes that they do not take.
 */
export function linearMatrixVariants(gpu: Gpu, descriptor: LinearDescriptor): LinearVariants {
  const { weight, dialect = "device" } = descriptor;
  if (dialect === "device" && !gpu.features.subgroupMatrix) {
    throw new RangeError(`${weight.label}: f16 inputs need subgroup matrices, which ${gpu.name} does not offer`);
  }
  checkShape(descriptor);
  const tiles = dialect === "emulated" ? EMULATED_TILES : DEVICE_TILES;
  return descriptor.phase === "decode"
    ? decodeVariants(gpu, descriptor, tiles)
    : prefillVariants(gpu, descriptor, tiles);
}
