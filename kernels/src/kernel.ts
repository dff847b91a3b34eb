/**
 * What every launcher is made of: a compiled pipeline with an explicit bind group layout and an immediate block.
 *
 * Pipelines and bind groups are made once. A token step only encodes: `setPipeline`, `setBindGroup`,
 * `setImmediates`, `dispatchWorkgroups`. Dynamic values (row counts, positions) travel as immediates, at most 64 bytes.
 */
import type { Gpu } from "./device.ts";

export type BindingAccess = "read" | "read_write";

/** WebGPU's portable size of the immediate block, in bytes. */
export const MAX_IMMEDIATE_BYTES = 64;

type ImmediatePass = GPUComputePassEncoder & {
  setImmediates(offset: number, data: ArrayBufferView | ArrayBufferLike): void;
};

export interface KernelDescriptor {
  /** Shown in errors and traces. */
  readonly label: string;
  readonly code: string;
  /** One entry per `@group(0) @binding(i)`, in order. */
  readonly bindings: readonly BindingAccess[];
  /** Bytes of `var<immediate>`; 0 where the kernel has none. */
  readonly immediateBytes?: number;
  readonly constants?: Record<string, number>;
  readonly entryPoint?: string;
}

/** A bound kernel: encode it as often as wanted; nothing is created. */
export interface BoundKernel {
  /** @param immediates 32-bit words; the kernel's whole immediate block. @param grid workgroups in x, y, z. */
  encode(
    pass: GPUComputePassEncoder,
    immediates: Uint32Array | undefined,
    grid: readonly [number, number?, number?],
  ): void;
}

export interface Kernel {
  readonly label: string;
  /** Binds buffers in the order of `bindings`. An entry with `offset`/`size` binds a window (aligned to 256 bytes). */
  bind(buffers: readonly (GPUBuffer | GPUBufferBinding)[]): BoundKernel;
}

/** The shader does not compile or the pipeline is refused; the message carries Dawn's text with line numbers. */
export class KernelCompileError extends Error {
  override readonly name = "KernelCompileError";
}

/** Compiles one kernel. @throws KernelCompileError with the driver's message. */
export async function createKernel(gpu: Gpu, descriptor: KernelDescriptor): Promise<Kernel> {
  const { device } = gpu;
  const { label, bindings, immediateBytes = 0 } = descriptor;
  if (immediateBytes > MAX_IMMEDIATE_BYTES)
    throw new RangeError(`${label}: ${immediateBytes} immediate bytes, at most 64`);
  device.pushErrorScope("validation");
  const module = device.createShaderModule({ label, code: descriptor.code });
  const layout = device.createBindGroupLayout({
    label,
    entries: bindings.map((access, binding) => ({
      binding,
      visibility: GPUShaderStage.COMPUTE,
      buffer: { type: access === "read" ? "read-only-storage" : "storage" },
    })),
  });
  const pipelineLayout = device.createPipelineLayout({
    label,
    bindGroupLayouts: [layout],
    ...(immediateBytes > 0 ? { immediateSize: immediateBytes } : {}),
  } as GPUPipelineLayoutDescriptor);
  const compiled = device.createComputePipelineAsync({
    label,
    layout: pipelineLayout,
    compute: {
      module,
      entryPoint: descriptor.entryPoint ?? "main",
      ...(descriptor.constants === undefined ? {} : { constants: descriptor.constants }),
    },
  });
  // The scope is closed before anything is awaited, so that kernels compiled side by side do not mix their errors.
  const [scope, outcome] = await Promise.allSettled([device.popErrorScope(), compiled]);
  const error = scope.status === "fulfilled" ? scope.value : scope.reason;
  if (error !== null) throw new KernelCompileError(`${label}: ${error.message}`);
  if (outcome.status === "rejected") throw new KernelCompileError(`${label}: ${(outcome.reason as Error).message}`);
  const pipeline = outcome.value;
  return { label, bind: (buffers) => bindKernel(device, label, pipeline, layout, bindings.length, buffers) };
}

function bindKernel(
  device: GPUDevice,
  label: string,
  pipeline: GPUComputePipeline,
  layout: GPUBindGroupLayout,
  bindingCount: number,
  buffers: readonly (GPUBuffer | GPUBufferBinding)[],
): BoundKernel {
  if (buffers.length !== bindingCount)
    throw new RangeError(`${label}: ${buffers.length} buffers for ${bindingCount} bindings`);
  const group = device.createBindGroup({
    label,
    layout,
    entries: buffers.map((buffer, binding) => ({ binding, resource: "buffer" in buffer ? buffer : { buffer } })),
  });
  return {
    encode(pass, immediates, grid) {
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      if (immediates !== undefined) {
        const { buffer, byteLength } = immediates;
        // A view costs Dawn's binding as much as the rest of a dispatch; a buffer, a third of that.
        (pass as ImmediatePass).setImmediates(0, buffer.byteLength === byteLength ? buffer : immediates);
      }
      pass.dispatchWorkgroups(grid[0], grid[1] ?? 1, grid[2] ?? 1);
    },
  };
}
