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
export type { DecodeVariant } from "./kv-decode.ts";
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
export type {
  DecodePlan,
  DecodeRow,
  DecodeStepPlan,
  PrefillChunk,
  PrefillPlan,
  SealPlan,
  SealWindow,
} from "./kv-steps.ts";
export { buildRopeTable, type RopeScaling, type RopeTableOptions, ropeFrequencies } from "./rope-table.ts";
// --- end kv

// Dense layers.
export { type ActivationType, activationType } from "./activation-type.ts";
export { type BoundEmbedding, createEmbedding, type Embedding, type EmbeddingBuffers } from "./embedding.ts";
export { dequantizeGgml, GGML_TYPES, type GgmlType, ggmlBlock, ggmlByteLength } from "./ggml-quants.ts";
export { floatToHalf, halfToFloat } from "./half.ts";
export { cachedKernel } from "./kernel-cache.ts";
export {
  type BoundLinear,
  createLinear,
  type Linear,
  type LinearBuffers,
  type LinearDescriptor,
  type LinearEpilogue,
  type LinearNumerics,
} from "./linear.ts";
export {
  createLinearWeight,
  type LinearWeight,
  type LinearWeightDescriptor,
  LinearWeightMixError,
  type LinearWeightPart,
  LinearWeightSizeError,
} from "./linear-weight.ts";
export { copyLinearWeight } from "./linear-weight-copy.ts";
export { type BoundRmsNorm, createRmsNorm, type RmsNorm, type RmsNormBuffers } from "./rms-norm.ts";
export {
  type BoundSampler,
  createSampler,
  readSampleResult,
  SAMPLE_PARAMETER_BYTES,
  SAMPLE_RESULT_BYTES,
  type SampleParameters,
  type SampleResult,
  type Sampler,
  type SamplerBuffers,
  writeSampleParameters,
} from "./sample.ts";
export {
  type CheckedFeature,
  KERNEL_CHECKS,
  type KernelCheck,
  type KernelFallback,
  type SelfTestOptions,
  selfTest,
} from "./self-test.ts";
export { type BoundSiluMul, createSiluMul, type SiluMul, type SiluMulBuffers } from "./silu-mul.ts";
export {
  type BoundTokenLoad,
  type BoundTokenStore,
  createTokenFeedback,
  FEEDBACK_ROW_WORDS,
  TOKEN_OF_SLOT,
  type TokenFeedback,
  type TokenLoadBuffers,
  type TokenStoreBuffers,
} from "./token-feedback.ts";
export type { WeightFormat } from "./weight-encoding.ts";
