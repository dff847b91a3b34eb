/** Sealing: quantizes and packs full groups of 32 tokens into their pages. Chooses the kernel that fits the device. */
import type { Gpu } from "./device.ts";
import { cachedKernel } from "./kernel-cache.ts";
import { type KvSealTemplate, kvSealWgsl } from "./kv-seal.wgsl.ts";
import {
  kvSealTileWgsl,
  NEGATIVE_ZERO_BITS,
  SEAL_TILE_IMMEDIATE_BYTES,
  sealTileGrid,
  sealTileParts,
  sealTileSupports,
} from "./kv-seal-tile.wgsl.ts";

/**
 * `loops`: a thread a token, for software drivers. `tiles`: in registers, by subgroups of 32 whose `fma` rounds once (the
 * self-test looks). `tiles-memory`: the same without either, for tests.
 */
export type KvSealVariant = "loops" | "tiles" | "tiles-memory";

export interface KvSealDescriptor extends KvSealTemplate {
  /** Overrides the choice by the device; for tests. */
  readonly variant?: KvSealVariant;
}

export interface KvSealBuffers {
  /** f16 pairs: chunkKv or residual, as the descriptor's strides say. */
  readonly source: GPUBuffer;
  /** u32 [blocks][4]: first token in the source, slot, position of the block, unused. */
  readonly seals: GPUBuffer;
  /** u32 [slots][maxPages]. */
  readonly pageTable: GPUBuffer;
  readonly pages: GPUBuffer;
  /** u32 [slots]: bit 0 is set where K, bit 1 where V is not finite. */
  readonly status: GPUBuffer;
}

export interface BoundKvSeal {
  /** Seals `blocks` entries of the table, from entry `first` (default 0). */
  encode(pass: GPUComputePassEncoder, blocks: number, first?: number): void;
}

export interface KvSeal {
  readonly variant: KvSealVariant;
  bind(buffers: KvSealBuffers): BoundKvSeal;
}

function hasSubgroupsOf32(gpu: Gpu): boolean {
  const info = gpu.device.adapterInfo as GPUAdapterInfo & { subgroupMinSize?: number; subgroupMaxSize?: number };
  return gpu.features.subgroups && info.subgroupMinSize === 32 && info.subgroupMaxSize === 32;
}

/** The variant for a device and a format. */
export function kvSealVariant(gpu: Gpu, { format, shape }: Pick<KvSealTemplate, "format" | "shape">): KvSealVariant {
  return gpu.profile === "hardware" && hasSubgroupsOf32(gpu) && sealTileSupports(format, shape) ? "tiles" : "loops";
}

const BINDINGS = ["read", "read", "read", "read_write", "read_write"] as const;

/** @throws RangeError where `variant` is given and cannot hold the format. */
export async function createKvSeal(gpu: Gpu, descriptor: KvSealDescriptor): Promise<KvSeal> {
  const { format, shape } = descriptor;
  const variant = descriptor.variant ?? kvSealVariant(gpu, descriptor);
  const groups = shape.blockTokens / 32;
  const label = `kv seal ${format.name} ${variant}`;
  if (variant === "loops") {
    const kernel = await cachedKernel(gpu, {
      label,
      code: kvSealWgsl(descriptor),
      bindings: BINDINGS,
      immediateBytes: 8,
    });
    return {
      variant,
      bind({ source, seals, pageTable, pages, status }) {
        const bound = kernel.bind([source, seals, pageTable, pages, status]);
        const words = new Uint32Array([1, 0]);
        return {
          encode(pass, blocks, first = 0) {
            words[1] = first;
            bound.encode(pass, words, [blocks * groups, shape.kvHeads, 2]);
          },
        };
      },
    };
  }
  if (!sealTileSupports(format, shape))
    throw new RangeError(`${label}: no tiles for heads of ${shape.headDim} in format ${format.name}`);
  const kernels = await Promise.all(
    sealTileParts(format).map(async (part) => {
      const device = variant === "tiles";
      const exchange = device ? "subgroup" : "memory";
      const template = { ...descriptor, part, exchange, unroll: device, fused: device } as const;
      const kernel = await cachedKernel(gpu, {
        label: `${label} ${part}`,
        code: kvSealTileWgsl(template),
        bindings: BINDINGS,
        immediateBytes: SEAL_TILE_IMMEDIATE_BYTES,
      });
      return { kernel, width: sealTileGrid(template) };
    }),
  );
  return {
    variant,
    bind({ source, seals, pageTable, pages, status }) {
      const buffers = [source, seals, pageTable, pages, status];
      const bound = kernels.map(({ kernel, width }) => ({ kernel: kernel.bind(buffers), width }));
      const words = new Uint32Array([NEGATIVE_ZERO_BITS, 0]);
      return {
        encode(pass, blocks, first = 0) {
          words[1] = first;
          for (const { kernel, width } of bound) kernel.encode(pass, words, [width, blocks * groups]);
        },
      };
    },
  };
}
