/** The KV kernels with their buffers: pages of every layer, residual windows, and the page tables' host mirror. */
import { buildRopeTable, createKvKernels, type Gpu, type KvKernels, type KvLayer, pageBytes } from "@kivimesh/kernels";
import type { ModelConfig } from "../model/model-config.ts";
import type { Activations } from "./activations.ts";
import type { MemoryAccount } from "./memory-account.ts";
import type { KvGeometry, RunnerLimits } from "./model-runner.ts";

export interface KvCache {
  readonly kernels: KvKernels;
  readonly layers: readonly KvLayer[];
  /** Bytes of a page: one layer's slice of a block. */
  readonly pageBytes: number;
  /** One buffer a layer: [numPages][pageBytes]. */
  readonly pages: readonly GPUBuffer[];
  /** Enters a sequence's page table; only what differs from the slot's last table is written. */
  setPages(slot: number, pageTable: readonly number[]): void;
}

export interface KvCacheDescriptor {
  readonly config: ModelConfig;
  readonly kv: KvGeometry;
  readonly limits: RunnerLimits;
  readonly activations: Activations;
  readonly numerics: "invariant" | "fast";
}

export async function createKvCache(gpu: Gpu, memory: MemoryAccount, descriptor: KvCacheDescriptor): Promise<KvCache> {
  const { config, kv, limits, activations, numerics } = descriptor;
  const { theta, dimensions, scaling, frequencyFactors, layout } = config.rope;
  const ropeTable = buildRopeTable({
    ropeDim: dimensions,
    theta,
    maxPositions: limits.maxContextTokens,
    ...(scaling === undefined ? {} : { scaling }),
    ...(frequencyFactors === undefined ? {} : { frequencyFactors }),
  });
  const kernels = await createKvKernels(gpu, {
    format: kv.format,
    shape: kv,
    heads: config.heads,
    maxRows: limits.maxPrefillRows,
    maxDecodeRows: limits.maxSequences,
    maxDecodeSteps: limits.maxDecodeSteps,
    outputType: activations.type,
    numerics,
    maxSlots: limits.maxSequences,
    maxPagesPerSequence: limits.maxPagesPerSequence,
    maxPositions: limits.maxContextTokens,
    ropeLayout: layout,
    ropeDim: dimensions,
    ropeTable,
  });
  memory.own("other", kernels.bytes, kernels);
  const bytes = pageBytes(kv.format, kv);
  const chunkKv = memory.storage("activations", "chunk K and V", kernels.chunkKvBytes);
  const pages: GPUBuffer[] = [];
  const layers: KvLayer[] = [];
  const encoder = gpu.device.createCommandEncoder();
  for (let layer = 0; layer < config.layers; layer++) {
    const layerPages = memory.storage("kv", `layer ${layer} pages`, limits.numPages * bytes);
    const residual = memory.storage("kv", `layer ${layer} residual`, kernels.residualBytes);
    // Masked tokens are multiplied by zero: what lies there must be finite from the start.
    encoder.clearBuffer(layerPages);
    encoder.clearBuffer(residual);
    pages.push(layerPages);
    const { qkv, attention } = activations;
    layers.push(kernels.bindLayer({ qkv, pages: layerPages, residual, chunkKv, output: attention }));
  }
  encoder.clearBuffer(chunkKv);
  gpu.device.queue.submit([encoder.finish()]);
  for (let slot = 0; slot < limits.maxSequences; slot++) kernels.clearStatus(slot);
  return {
    kernels,
    layers,
    pageBytes: bytes,
    pages,
    setPages: pageTableWriter(kernels, limits),
  };
}

function pageTableWriter(kernels: KvKernels, limits: RunnerLimits): KvCache["setPages"] {
  const width = limits.maxPagesPerSequence;
  const mirror = new Int32Array(limits.maxSequences * width).fill(-1);
  return (slot, pageTable) => {
    const base = slot * width;
    let first = 0;
    while (first < pageTable.length && mirror[base + first] === pageTable[first]) first++;
    if (first === pageTable.length) return;
    const changed = pageTable.slice(first);
    mirror.set(changed, base + first);
    kernels.setPages(slot, first, changed);
  };
}
