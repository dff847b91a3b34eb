/** Sizes of the KV cache that follow from the model, the format and the memory that it may take. */
import { bitsPerElement, blockBytes, type KvShape, kvFormat, pageBytes, validateKv } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { ModelConfig } from "../model/model-config.ts";
import type { KvGeometry } from "./model-runner.ts";

const DEFAULT_KV_BYTES = 512 << 20;

/** @throws ClusterError INVALID_ARGUMENT for an unknown format or one that cannot hold the model's heads. */
export function kvGeometry(
  config: ModelConfig,
  formatName: string,
  blockTokens: number,
  residualTokens: number,
): KvGeometry {
  const { layers, kvHeads, headDim } = config;
  const shape: KvShape = { layers, kvHeads, headDim, blockTokens, residualTokens };
  try {
    const format = kvFormat(formatName);
    validateKv(format, shape);
    return {
      format,
      formatId: format.id,
      layers,
      kvHeads,
      headDim,
      blockTokens,
      residualTokens,
      blockBytes: blockBytes(format, shape),
      f16BytesPerToken: layers * 2 * kvHeads * headDim * 2,
      bitsPerElement: bitsPerElement(format, shape),
    };
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new ClusterError("INVALID_ARGUMENT", `KV format ${formatName}: ${error.message}`, { cause: error });
  }
}

export interface PagePoolRequest {
  readonly maxSequences: number;
  readonly maxPagesPerSequence: number;
  /** Bytes for pages of all layers; undefined: the default. */
  readonly kvBytes?: number;
}

/** What a device says about buffers, in bytes. */
export interface BufferLimits {
  readonly maxStorageBufferBindingSize: number;
  readonly maxBufferSize: number;
}

/**
 * Pages in the pool: what the bytes allow, at most what one binding of the device holds for a layer.
 * @throws ClusterError INVALID_ARGUMENT where not even one residual window of blocks fits.
 */
export function pagesInPool(device: BufferLimits, kv: KvGeometry, request: PagePoolRequest): number {
  const all = request.maxSequences * request.maxPagesPerSequence;
  const wanted = request.kvBytes ?? Math.min(all * kv.blockBytes, DEFAULT_KV_BYTES);
  const { maxStorageBufferBindingSize, maxBufferSize } = device;
  const layerBytes = pageBytes(kv.format, kv);
  const bound = Math.floor(Math.min(maxStorageBufferBindingSize, maxBufferSize) / layerBytes);
  const pages = Math.min(Math.floor(wanted / kv.blockBytes), bound);
  const window = kv.residualTokens / kv.blockTokens;
  if (pages < window) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `kvBytes ${wanted} holds ${pages} KV blocks of ${kv.blockBytes} bytes; at least ${window} are needed`,
      { parameter: "kvBytes" },
    );
  }
  return pages;
}
