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
