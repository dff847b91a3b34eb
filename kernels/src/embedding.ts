/** Token embedding: gathers rows of a weight table, which may be the (tied, quantized) weight of the output head. */
import type { Gpu } from "./device.ts";
import { checkRows, elementGrid } from "./element-grid.ts";
import { embeddingWgsl } from "./embedding.wgsl.ts";
import { cachedKernel } from "./kernel-cache.ts";
import type { LinearWeight } from "./linear-weight.ts";

export interface EmbeddingBuffers {
  /** u32 [rows]; a token outside the table makes a row of NaN. */
  readonly tokens: GPUBuffer;
  /** f32 [rows][hidden]. */
  readonly output: GPUBuffer;
}

export interface BoundEmbedding {
  /** @throws RangeError unless 1 ≤ rows ≤ 65535. */
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

export interface Embedding {
  bind(buffers: EmbeddingBuffers): BoundEmbedding;
}

export interface EmbeddingDescriptor {
  /** [vocabulary][hidden]. */
  readonly weight: LinearWeight;
  /** Checked against the weight's columns. */
  readonly hidden: number;
}

/** @throws RangeError where the weight's columns are not `hidden`. */
export async function createEmbedding(gpu: Gpu, { weight, hidden }: EmbeddingDescriptor): Promise<Embedding> {
  if (weight.columns !== hidden)
    throw new RangeError(`${weight.label}: ${weight.columns} columns, embedding has ${hidden}`);
  const kernel = await cachedKernel(gpu, {
    label: `embedding ${weight.format} ${weight.rows}x${hidden}`,
    code: embeddingWgsl(weight.encoding, weight.layout, weight.rows, hidden),
    bindings: ["read", "read", "read", "read_write"],
  });
  return {
    bind({ tokens, output }) {
      const bound = kernel.bind([tokens, weight.codes, weight.scales, output]);
      return {
        encode(pass, rows) {
          checkRows("embedding", rows);
          bound.encode(pass, undefined, elementGrid(hidden / 4, rows));
        },
      };
    },
  };
}
