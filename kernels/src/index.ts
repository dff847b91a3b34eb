export { createStorage, readBuffer, submitPass, uploadStorage } from "./buffers.ts";
export {
  type DeviceProfile,
  type Gpu,
  type GpuFeatures,
  GpuUnavailableError,
  type OpenGpuOptions,
  openGpu,
} from "./device.ts";
export {
  type BindingAccess,
  type BoundKernel,
  createKernel,
  type Kernel,
  KernelCompileError,
  type KernelDescriptor,
  MAX_IMMEDIATE_BYTES,
} from "./kernel.ts";
// --- kv: formats, page layout, rope, sealing, attention
export {
  DEFAULT_KV_FORMAT,
  KV_FORMAT_NAMES,
  KV_GROUP,
  KV_LAYOUT_VERSION,
  type KvBits,
  type KvFormat,
  type KvShape,
  kvFormat,
  validateKv,
} from "./kv-format.ts";
export {
  createKvKernels,
  KV_STATUS_KEY_NOT_FINITE,
  KV_STATUS_VALUE_NOT_FINITE,
  type KvKernelOptions,
  type KvKernels,
  type KvLayer,
  type KvLayerBuffers,
  type RopeLayout,
} from "./kv-kernels.ts";
export { bitsPerElement, blockBytes, type KvPageLayout, kvPageLayout, pageBytes } from "./kv-layout.ts";
export { decodePage, encodePage, type KvPageValues, type QuantizedGroup, quantizeGroup } from "./kv-page.ts";
export type { DecodePlan, DecodeRow, PrefillChunk, PrefillPlan, SealPlan, SealWindow } from "./kv-steps.ts";
export { buildRopeTable, type RopeScaling, type RopeTableOptions, ropeFrequencies } from "./rope-table.ts";
// --- end kv
