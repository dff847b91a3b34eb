/**
 * Opens the GPU: one Dawn device with every limit the adapter offers and the optional features that kernels know.
 *
 * Two profiles pick kernel variants: `software` (lavapipe, SwiftShader: loops, few barriers) and `hardware`.
 */
import { create, globals } from "webgpu";

Object.assign(globalThis, globals);

/** Kernel variants are chosen by this, never by the vendor's name inside a kernel. */
export type DeviceProfile = "software" | "hardware";

export interface GpuFeatures {
  readonly shaderF16: boolean;
  readonly subgroups: boolean;
  /** Lanes per subgroup; 1 where subgroups are not offered. */
  readonly subgroupSize: number;
  readonly timestampQuery: boolean;
  /** Products of 16 × 16 × 16 f16 matrices with f32 sums, by subgroups of 32: what subgroup-matrix.ts writes. */
  readonly subgroupMatrix: boolean;
}

export interface Gpu {
  readonly device: GPUDevice;
  /** Human-readable adapter name, for logs and reports. */
  readonly name: string;
  readonly profile: DeviceProfile;
  readonly features: GpuFeatures;
  /** Variants that the self-test refused; their features are off. */
  readonly fallbacks?: readonly { readonly variant: string; readonly reason: string }[];
  /** Resolves with the reason if the device is lost; the process should then exit and be restarted. */
  readonly lost: Promise<string>;
  /** Waits for queued work, then destroys the device. */
  close(): Promise<void>;
}

const REQUIRED_LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxImmediateSize",
] as const;

export interface OpenGpuOptions {
  /** Substring of the adapter's name, where several are installed. */
  readonly adapter?: string;
  readonly profile?: DeviceProfile;
  /** Drops Dawn's bounds clamps and API validation; for fuzzed, released kernels on real GPUs. Default: hardware only. */
  readonly unchecked?: boolean;
  /** Asks for no more than these, so that what runs here also runs where no more is offered. */
  readonly limits?: { readonly [name in (typeof REQUIRED_LIMITS)[number]]?: number };
}

/** The least of the drivers that are served (SwiftShader's). */
export const PORTABLE_LIMITS = {
  maxComputeInvocationsPerWorkgroup: 256,
  maxComputeWorkgroupSizeX: 256,
  maxComputeWorkgroupStorageSize: 32 * 1024,
  maxStorageBuffersPerShaderStage: 12,
} as const;

/** No adapter: the message says what to install. */
export class GpuUnavailableError extends Error {
  override readonly name = "GpuUnavailableError";
}

// Dawn's instance must stay strongly referenced for the life of the process: a collected one takes the devices with it.
const instances: GPU[] = [];

function createInstance(unchecked: boolean, adapter?: string): GPU {
  const enabled = ["vulkan_enable_f16_on_nvidia", "allow_unsafe_apis"];
  const disabled = ["timestamp_quantization"];
  if (unchecked) {
    enabled.push("disable_robustness", "skip_validation", "disable_workgroup_init");
    disabled.push("lazy_clear_resource_on_first_use");
  }
  const options = [`enable-dawn-features=${enabled.join(",")}`, `disable-dawn-features=${disabled.join(",")}`];
  if (adapter !== undefined) options.push(`adapter=${adapter}`);
  const instance = create(options);
  instances.push(instance);
  return instance;
}

function isSoftware(info: GPUAdapterInfo): boolean {
  return /llvmpipe|lavapipe|swiftshader/i.test(
    `${info.device} ${info.description} ${info.architecture} ${info.vendor}`,
  );
}

/** What Dawn tells beyond the types of @webgpu/types. */
type AdapterInfo = GPUAdapterInfo & {
  readonly subgroupMinSize?: number;
  readonly subgroupMaxSize?: number;
  readonly subgroupMatrixConfigs?: readonly {
    readonly componentType: string;
    readonly resultComponentType: string;
    readonly M: number;
    readonly N: number;
    readonly K: number;
  }[];
};

function offersSubgroupMatrix(offered: ReadonlySet<string>, info: AdapterInfo): boolean {
  if (!offered.has("chromium-experimental-subgroup-matrix") || !offered.has("shader-f16")) return false;
  if (info.subgroupMinSize !== 32 || info.subgroupMaxSize !== 32) return false;
  return [...(info.subgroupMatrixConfigs ?? [])].some(
    ({ componentType, resultComponentType, M, N, K }) =>
      componentType === "f16" && resultComponentType === "f32" && M === 16 && N === 16 && K === 16,
  );
}

/** Software drivers describe themselves; a GPU's description names only its driver, so the device goes before it. */
function adapterName(info: GPUAdapterInfo, profile: DeviceProfile): string {
  const parts = profile === "hardware" ? [info.device, info.description] : [info.description || info.device];
  return parts.filter((part) => part !== "").join(", ") || info.vendor;
}

function requiredLimits(adapter: GPUAdapter, wanted: OpenGpuOptions["limits"] = {}): Record<string, number> {
  const limits = adapter.limits as unknown as Record<string, number | undefined>;
  const required: Record<string, number> = {};
  for (const name of REQUIRED_LIMITS) {
    const value = limits[name];
    if (value !== undefined) required[name] = Math.min(value, wanted[name] ?? value);
  }
  return required;
}

/**
 * Opens the first matching adapter.
 * @throws GpuUnavailableError where no Vulkan driver answers.
 */
export async function openGpu(options: OpenGpuOptions = {}): Promise<Gpu> {
  let adapter = await createInstance(options.unchecked ?? false, options.adapter).requestAdapter();
  if (adapter === null) {
    throw new GpuUnavailableError(
      "no WebGPU adapter found: install a GPU driver with Vulkan, or lavapipe (Debian: apt-get install mesa-vulkan-drivers, version 24 or newer)",
    );
  }
  const profile = options.profile ?? (isSoftware(adapter.info) ? "software" : "hardware");
  if (options.unchecked === undefined && profile === "hardware") {
    adapter = (await createInstance(true, options.adapter).requestAdapter()) ?? adapter;
  }
  const offered = adapter.features as ReadonlySet<string>;
  const wanted = ["shader-f16", "subgroups", "timestamp-query", "chromium-experimental-subgroup-matrix"];
  const device = await adapter.requestDevice({
    requiredFeatures: wanted.filter((feature) => offered.has(feature)) as GPUFeatureName[],
    requiredLimits: requiredLimits(adapter, options.limits),
  });
  const info = adapter.info as AdapterInfo;
  return {
    device,
    name: adapterName(info, profile),
    profile,
    features: {
      shaderF16: offered.has("shader-f16"),
      subgroups: offered.has("subgroups"),
      subgroupSize: offered.has("subgroups") ? (info.subgroupMaxSize ?? 1) : 1,
      timestampQuery: offered.has("timestamp-query"),
      subgroupMatrix: offersSubgroupMatrix(offered, info),
    },
    lost: device.lost.then((reason) => `${reason.reason}: ${reason.message}`),
    async close() {
      await device.queue.onSubmittedWorkDone();
      device.destroy();
    },
  };
}
