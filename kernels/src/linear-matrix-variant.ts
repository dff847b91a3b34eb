/** Which matrix kernels a layer gets: tiles by phase, shape and rows. All variants of one phase give equal bits. */
import type { Gpu } from "./device.ts";
import type { LinearDescriptor } from "./linear.ts";
import { linearMatrixPrefillWgsl, type MatrixTile, tileOutputs, tileRows } from "./linear-matrix-prefill.wgsl.ts";
import type { LinearVariant, LinearVariants } from "./linear-variant.ts";
import { matrixDialect } from "./subgroup-matrix.ts";

/** Small enough for software drivers to compile. */
const EMULATED_TILES: readonly MatrixTile[] = [{ subgroupsM: 1, subgroupsN: 2, tilesM: 1, tilesN: 2, depth: 32 }];

const TILES: readonly MatrixTile[] = [{ subgroupsM: 2, subgroupsN: 2, tilesM: 4, tilesN: 4, depth: 32 }];

function prefillVariant(gpu: Gpu, descriptor: LinearDescriptor, tile: MatrixTile): LinearVariant {
  const { weight, epilogue = "none", dialect = "device" } = descriptor;
  const { encoding } = weight;
  const outputs = tileOutputs(tile);
  return {
    label: `linear matrix prefill ${encoding.format} ${encoding.scales} ${encoding.group} ${tileRows(tile)}x${outputs} ${epilogue}`,
    code: linearMatrixPrefillWgsl({
      encoding,
      tile,
      epilogue,
      dialect: matrixDialect(dialect),
      shaderF16: gpu.features.shaderF16,
    }),
    grid: (rows) => [Math.ceil(rows / tileRows(tile)), Math.ceil(weight.rows / outputs)],
  };
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
  const tiles = dialect === "emulated" ? EMULATED_TILES : TILES;
  return { variants: tiles.map((tile) => prefillVariant(gpu, descriptor, tile)), choose: () => 0 };
}
