/** Which matrix kernels a layer gets: tiles by phase, shape and rows. All variants of one phase give equal bits. */
import type { Gpu } from "./device.ts";
import type { LinearDescriptor } from "./linear.ts";
import { linearMatrixPrefillWgsl, type MatrixTile, tileOutputs, tileRows } from "./linear-matrix-prefill.wgsl.ts";
import type { LinearVariant, LinearVariants } from "./linear-variant.ts";
import { matrixDialect } from "./subgroup-matrix.ts";

interface PrefillTiles {
  /** For dispatches of at least a tile of rows. */
  readonly large: MatrixTile;
  /** For fewer rows, and where large tiles would leave most of the GPU idle. */
  readonly small: MatrixTile;
  /** Tiles that fill the GPU. */
  readonly enough: number;
}

const DEVICE_TILES: PrefillTiles = {
  large: { subgroupsM: 2, subgroupsN: 2, tilesM: 4, tilesN: 4 },
  small: { subgroupsM: 2, subgroupsN: 2, tilesM: 2, tilesN: 2 },
  enough: 100,
};

/** Small enough for software drivers to compile. */
const EMULATED_TILES: PrefillTiles = {
  large: { subgroupsM: 1, subgroupsN: 2, tilesM: 1, tilesN: 2 },
  small: { subgroupsM: 1, subgroupsN: 1, tilesM: 1, tilesN: 2 },
  enough: 1,
};

function prefillVariant(gpu: Gpu, descriptor: LinearDescriptor, tile: MatrixTile, wholeRows: boolean): LinearVariant {
  const { weight, accumulate, epilogue = "none", dialect = "device" } = descriptor;
  const { encoding, rows: n, columns: k } = weight;
  const outputs = tileOutputs(tile);
  const code = linearMatrixPrefillWgsl({
    encoding,
    tile,
    slices: 1,
    depth: dialect === "device" && k % 64 === 0 ? 64 : 32,
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
    label: `linear matrix prefill ${encoding.format} ${encoding.scales} ${encoding.group} ${k} to ${n} ${epilogue} ${tileRows(tile)}x${outputs}`,
    code,
    grid: (rows) => [Math.ceil(rows / tileRows(tile)), Math.ceil(n / outputs)],
  };
}

function prefillVariants(gpu: Gpu, descriptor: LinearDescriptor, tiles: PrefillTiles): LinearVariants {
  const { weight, maxRows } = descriptor;
  const { large, small, enough } = tiles;
  const fits = (rows: number) => {
    const count = Math.ceil(rows / tileRows(large)) * Math.ceil(weight.rows / tileOutputs(large));
    return rows >= tileRows(large) && count >= enough;
  };
  const variants = [prefillVariant(gpu, descriptor, small, false)];
  if (fits(maxRows)) variants.push(prefillVariant(gpu, descriptor, large, true));
  return { variants, choose: (rows) => (fits(rows) ? 1 : 0) };
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
  return prefillVariants(gpu, descriptor, dialect === "emulated" ? EMULATED_TILES : DEVICE_TILES);
}
