/**
 * Sampling on the GPU: greedy, or temperature → top-k → top-p → draw.
 *
 * Random numbers are a hash of (seed, position): the same on every device, and independent of the batch.
 */
import { createStorage } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import { cachedKernel } from "./kernel-cache.ts";
import {
  SAMPLE_IMMEDIATE_BYTES,
  SAMPLE_PARTIAL_BYTES,
  SAMPLE_SLICES,
  samplePickWgsl,
  sampleScanWgsl,
} from "./sample.wgsl.ts";
import { type SamplePickTemplate, samplePickSlicesWgsl } from "./sample-pick.wgsl.ts";
import {
  type SampleSliceTemplate,
  SLICE_IMMEDIATE_BYTES,
  SLICE_PARTIAL_BYTES,
  sampleSlices,
  sampleSlicesWgsl,
  sliceCount,
  sliceImmediates,
  subCount,
} from "./sample-slices.wgsl.ts";

/** Bytes of one row's parameters; see `writeSampleParameters`. */
export const SAMPLE_PARAMETER_BYTES = 32;
/** Bytes of one row's result: token u32, logprob f32, nonFinite u32, reserved. */
export const SAMPLE_RESULT_BYTES = 16;

export interface SampleParameters {
  /** 0 = greedy; ties go to the lowest index. */
  readonly temperature: number;
  /** Keep the k most likely tokens; 0 = all. Among equal logits the lowest indices are kept. */
  readonly topK: number;
  /** Then keep the fewest tokens whose probabilities reach topP; 1 = all. */
  readonly topP: number;
  /** 64 bits, as two u32. */
  readonly seedLow: number;
  readonly seedHigh: number;
  /** Position of the token that is drawn. */
  readonly position: number;
}

/** Writes one row's parameters into a host copy of the parameter buffer. */
export function writeSampleParameters(view: DataView, row: number, parameters: SampleParameters): void {
  const at = row * SAMPLE_PARAMETER_BYTES;
  view.setFloat32(at, parameters.temperature, true);
  view.setUint32(at + 4, parameters.topK, true);
  view.setFloat32(at + 8, parameters.topP, true);
  view.setUint32(at + 12, parameters.seedLow, true);
  view.setUint32(at + 16, parameters.seedHigh, true);
  view.setUint32(at + 20, parameters.position, true);
  view.setUint32(at + 24, 0, true);
  view.setUint32(at + 28, 0, true);
}

export interface SampleResult {
  readonly token: number;
  /** Of the token, under the softmax of the unmodified logits. */
  readonly logprob: number;
  /** A logit was NaN or infinite. */
  readonly nonFinite: boolean;
}

/** Reads one row's result from a host copy of the output buffer. */
export function readSampleResult(view: DataView, row: number): SampleResult {
  const at = row * SAMPLE_RESULT_BYTES;
  return {
    token: view.getUint32(at, true),
    logprob: view.getFloat32(at + 4, true),
    nonFinite: view.getUint32(at + 8, true) !== 0,
  };
}

export interface SamplerBuffers {
  /** f32 [rows][vocabulary]. */
  readonly logits: GPUBuffer;
  /** [rows] of 32 bytes. */
  readonly parameters: GPUBuffer;
  /** [rows] of 16 bytes. */
  readonly output: GPUBuffer;
}

export interface BoundSampler {
  /** @throws RangeError unless 1 ≤ rows ≤ maxRows. */
  encode(pass: GPUComputePassEncoder, rows: number): void;
}

export interface Sampler {
  /** Bytes of GPU memory that it holds for partial results. */
  readonly bytes: number;
  bind(buffers: SamplerBuffers): BoundSampler;
}

/** `rows`: for software drivers, nearly all of a row's work in one small workgroup. `slices`: by subgroups, for GPUs. */
export type SampleVariant = "rows" | "slices";

export interface SamplerDescriptor {
  readonly vocabulary: number;
  readonly maxRows: number;
  /** Overrides the choice by the device; for tests. */
  readonly variant?: SampleVariant;
}

/** The variant for a device: slices need subgroups of one known size. */
export function sampleVariant(gpu: Gpu): SampleVariant {
  return gpu.profile === "hardware" && gpu.features.subgroups && fixedSubgroups(gpu) ? "slices" : "rows";
}

function fixedSubgroups(gpu: Gpu): boolean {
  const info = gpu.device.adapterInfo as GPUAdapterInfo & { subgroupMinSize?: number; subgroupMaxSize?: number };
  return info.subgroupMinSize === info.subgroupMaxSize && gpu.features.subgroupSize >= 8;
}

/** @throws RangeError for an empty vocabulary or `maxRows` outside 1 … 65535. */
export async function createSampler(gpu: Gpu, descriptor: SamplerDescriptor): Promise<Sampler> {
  const { vocabulary, maxRows, variant = sampleVariant(gpu) } = descriptor;
  if (!Number.isInteger(vocabulary) || vocabulary < 1) throw new RangeError(`sampler: vocabulary ${vocabulary}`);
  if (!Number.isInteger(maxRows) || maxRows < 1 || maxRows > 65535) {
    throw new RangeError(`sampler: maxRows ${maxRows}, must be 1 … 65535`);
  }
  const { bind, scratch } = await (variant === "slices" ? bySlices : byRows)(gpu, vocabulary, maxRows);
  return {
    bytes: scratch.reduce((sum, { size }) => sum + size, 0),
    bind(buffers) {
      const encode = bind(buffers);
      return {
        encode(pass, rows) {
          if (!Number.isInteger(rows) || rows < 1 || rows > maxRows) {
            throw new RangeError(`sampler: ${rows} rows, must be 1 … ${maxRows}`);
          }
          encode(pass, rows);
        },
      };
    },
  };
}

interface SamplerKernels {
  readonly scratch: readonly GPUBuffer[];
  readonly bind: (buffers: SamplerBuffers) => (pass: GPUComputePassEncoder, rows: number) => void;
}

async function byRows(gpu: Gpu, vocabulary: number, maxRows: number): Promise<SamplerKernels> {
  const [scan, pick] = await Promise.all([
    cachedKernel(gpu, {
      label: "sample scan",
      code: sampleScanWgsl(),
      bindings: ["read", "read_write"],
      immediateBytes: SAMPLE_IMMEDIATE_BYTES,
    }),
    cachedKernel(gpu, {
      label: "sample pick",
      code: samplePickWgsl(),
      bindings: ["read", "read", "read", "read_write"],
      immediateBytes: SAMPLE_IMMEDIATE_BYTES,
    }),
  ]);
  const immediates = new Uint32Array([vocabulary, 2]);
  const partials = createStorage(gpu, "sample partials", maxRows * SAMPLE_SLICES * SAMPLE_PARTIAL_BYTES);
  const bind: SamplerKernels["bind"] = ({ logits, parameters, output }) => {
    const boundScan = scan.bind([logits, partials]);
    const boundPick = pick.bind([logits, partials, parameters, output]);
    return (pass, rows) => {
      boundScan.encode(pass, immediates, [SAMPLE_SLICES, rows]);
      boundPick.encode(pass, immediates, [rows]);
    };
  };
  return { bind, scratch: [partials] };
}

/** Most threads of the choice: more do not load faster. */
const MOST_PICK_THREADS = 1024;

function sliceTemplate(gpu: Gpu, vocabulary: number): SampleSliceTemplate & SamplePickTemplate {
  const { maxComputeInvocationsPerWorkgroup: most, maxComputeWorkgroupSizeX: wide } = gpu.device.limits;
  // A software driver, in tests, compiles and runs fewer threads much faster.
  const threads = gpu.profile === "software" ? 64 : Math.min(MOST_PICK_THREADS, most, wide);
  const sizes = gpu.profile === "software" ? "immediate" : "constant";
  return { ...sampleSlices(vocabulary, gpu.features.subgroupSize, sizes), threads };
}

async function bySlices(gpu: Gpu, vocabulary: number, maxRows: number): Promise<SamplerKernels> {
  const template = sliceTemplate(gpu, vocabulary);
  const slices = sliceCount(template);
  const immediateBytes = template.sizes === "immediate" ? SLICE_IMMEDIATE_BYTES : 0;
  const immediates = immediateBytes > 0 ? sliceImmediates(template) : undefined;
  const [scan, pick] = await Promise.all([
    cachedKernel(gpu, {
      label: `sample slices ${vocabulary}`,
      code: sampleSlicesWgsl(template),
      bindings: ["read", "read_write", "read_write", "read"],
      immediateBytes,
    }),
    cachedKernel(gpu, {
      label: `sample choice ${vocabulary}`,
      code: samplePickSlicesWgsl(template),
      bindings: ["read", "read", "read", "read", "read_write"],
      immediateBytes,
    }),
  ]);
  const partials = createStorage(gpu, "sample partials", maxRows * slices * SLICE_PARTIAL_BYTES);
  const subs = createStorage(gpu, "sample best keys", maxRows * subCount(template) * 4);
  const bind: SamplerKernels["bind"] = ({ logits, parameters, output }) => {
    const boundScan = scan.bind([logits, partials, subs, parameters]);
    const boundPick = pick.bind([logits, partials, subs, parameters, output]);
    return (pass, rows) => {
      boundScan.encode(pass, immediates, [slices, rows]);
      boundPick.encode(pass, immediates, [rows]);
    };
  };
  return { bind, scratch: [partials, subs] };
}
