/**
 * Start-up self-test: tiny known cases on this very device. What a driver gets wrong is not used: the feature that would
 * choose it is turned off in a derived `Gpu`, and the variants that do without it run instead.
 */
import type { Gpu, GpuFeatures } from "./device.ts";
import { HALF_CHECK, MATRIX_CHECK, SUBGROUP_CHECK } from "./self-test-features.ts";
import { NORM_CHECK, SAMPLE_CHECK, SEAL_CHECK } from "./self-test-kernels.ts";
import { DECODE_ATTENTION_CHECK, LINEAR_CHECK, PREFILL_ATTENTION_CHECK } from "./self-test-layers.ts";

/** Features that a failed check turns off. */
export type CheckedFeature = "shaderF16" | "subgroups" | "subgroupMatrix";

/** One known case. */
export interface KernelCheck {
  /** What runs, such as "subgroup matrix": the label of the fallback's count. */
  readonly variant: string;
  /** Without it nothing chooses the variant: the check is left out, and where the check fails it is turned off. */
  readonly feature: CheckedFeature;
  /** @returns undefined where the device is right, else what it got wrong. A kernel that does not compile may throw. */
  run(gpu: Gpu): Promise<string | undefined>;
}

/** A variant that a device may not use. */
export interface KernelFallback {
  readonly variant: string;
  readonly feature: CheckedFeature;
  readonly reason: string;
}

/** All known cases, features before the kernels that stand on them. */
export const KERNEL_CHECKS: readonly KernelCheck[] = [
  SUBGROUP_CHECK,
  HALF_CHECK,
  MATRIX_CHECK,
  NORM_CHECK,
  SAMPLE_CHECK,
  SEAL_CHECK,
  LINEAR_CHECK,
  DECODE_ATTENTION_CHECK,
  PREFILL_ATTENTION_CHECK,
];

export interface SelfTestOptions {
  /** Default: {@link KERNEL_CHECKS} on a GPU, none on a software driver, whose plain kernels are its only ones. */
  readonly checks?: readonly KernelCheck[];
  /** Told of each refused variant, in words for a log. */
  warn?(message: string): void;
}

/** What stands on what: without the first, the second is off too. */
const REQUIRED: Partial<Record<CheckedFeature, CheckedFeature>> = {
  shaderF16: "subgroupMatrix",
  subgroups: "subgroupMatrix",
};

function without(features: GpuFeatures, off: ReadonlySet<CheckedFeature>): GpuFeatures {
  const all = new Set(off);
  for (const feature of off) {
    const dependent = REQUIRED[feature];
    if (dependent !== undefined) all.add(dependent);
  }
  return {
    ...features,
    shaderF16: features.shaderF16 && !all.has("shaderF16"),
    subgroups: features.subgroups && !all.has("subgroups"),
    subgroupSize: all.has("subgroups") ? 1 : features.subgroupSize,
    subgroupMatrix: features.subgroupMatrix && !all.has("subgroupMatrix"),
  };
}

async function outcome(check: KernelCheck, gpu: Gpu): Promise<string | undefined> {
  try {
    return await check.run(gpu);
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

/**
 * Runs the checks side by side.
 * @returns the same `gpu` where all pass; else one like it without what failed, whose `fallbacks` tell.
 */
export async function selfTest(gpu: Gpu, options: SelfTestOptions = {}): Promise<Gpu> {
  const checks = options.checks ?? (gpu.profile === "hardware" ? KERNEL_CHECKS : []);
  const chosen = checks.filter(({ feature }) => gpu.features[feature]);
  const reasons = await Promise.all(chosen.map((check) => outcome(check, gpu)));
  const fallbacks = chosen.flatMap(({ variant, feature }, index): KernelFallback[] => {
    const reason = reasons[index];
    return reason === undefined ? [] : [{ variant, feature, reason }];
  });
  if (fallbacks.length === 0) return gpu;
  for (const { variant, feature, reason } of fallbacks) {
    options.warn?.(`${gpu.name} gets "${variant}" wrong and runs without ${feature}: ${reason}`);
  }
  const features = without(gpu.features, new Set(fallbacks.map(({ feature }) => feature)));
  return { ...gpu, features, fallbacks: [...(gpu.fallbacks ?? []), ...fallbacks] };
}
