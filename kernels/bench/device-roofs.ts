/** What the device reaches at best, measured: bytes read, bytes copied, f32 multiply-adds, products of matrices. */
import { createKernel, createStorage, type Gpu, type Kernel, uploadStorage } from "../src/index.ts";
import { MATRIX_SIZE, MATRIX_THREADS } from "../src/subgroup-matrix.ts";
import { type TimingPlan, timeCase } from "./case-timing.ts";
import { COPY_CODE, MATRIX_SIDE, MATRIX_STEPS, MULTIPLY_ADD_CODE, matrixCode, READ_CODE } from "./roof-kernels.wgsl.ts";

export interface DeviceRoofs {
  /** GB/s of a kernel that only reads. */
  readonly readGb: number;
  /** GB/s of a copy, both directions counted. */
  readonly copyGb: number;
  /** TFLOP/s of f32 multiply-adds from registers. */
  readonly multiplyAddTflops: number;
  /** TFLOP/s of f16 matrix products with f32 sums from registers; undefined where there are no subgroup matrices. */
  readonly matrixTflops: number | undefined;
}

interface RoofKernel {
  readonly kernel: Kernel;
  readonly buffers: readonly GPUBuffer[];
  readonly groups: number;
}

async function milliseconds(gpu: Gpu, { kernel, buffers, groups }: RoofKernel, plan: TimingPlan): Promise<number> {
  const bound = kernel.bind(buffers);
  const { least } = await timeCase(
    gpu,
    {
      encode: (pass) => bound.encode(pass, undefined, [groups]),
      poison: () => undefined,
      check: async () => 0,
      tolerance: 0,
      destroy: () => undefined,
    },
    plan,
  );
  for (const buffer of buffers) buffer.destroy();
  return least;
}

async function readRoof(gpu: Gpu, plan: TimingPlan): Promise<number> {
  const bytes = gpu.profile === "software" ? 16 * 2 ** 20 : 2 ** 31 - 2 ** 20;
  const groups = Math.floor(bytes / (64 * 256 * 16));
  const kernel = await createKernel(gpu, { label: "read roof", code: READ_CODE, bindings: ["read", "read_write"] });
  const buffers = [createStorage(gpu, "in", bytes), createStorage(gpu, "out", groups * 4)];
  return (groups * 64 * 256 * 16) / (await milliseconds(gpu, { kernel, buffers, groups }, plan)) / 1e6;
}

async function copyRoof(gpu: Gpu, plan: TimingPlan): Promise<number> {
  const bytes = gpu.profile === "software" ? 8 * 2 ** 20 : 960 * 2 ** 20;
  const groups = bytes / (4 * 256 * 16);
  const kernel = await createKernel(gpu, { label: "copy roof", code: COPY_CODE, bindings: ["read", "read_write"] });
  const buffers = [createStorage(gpu, "in", bytes), createStorage(gpu, "out", bytes)];
  return (2 * bytes) / (await milliseconds(gpu, { kernel, buffers, groups }, plan)) / 1e6;
}

async function multiplyAddRoof(gpu: Gpu, plan: TimingPlan): Promise<number> {
  const groups = gpu.profile === "software" ? 16 : 132 * 64;
  const kernel = await createKernel(gpu, { label: "fma roof", code: MULTIPLY_ADD_CODE, bindings: ["read_write"] });
  const buffers = [createStorage(gpu, "out", groups * 64 * 16)];
  const time = await milliseconds(gpu, { kernel, buffers, groups }, plan);
  return (groups * 64 * 256 * 8 * 4 * 2) / time / 1e9;
}

async function matrixRoof(gpu: Gpu, plan: TimingPlan): Promise<number | undefined> {
  if (!gpu.features.subgroupMatrix) return undefined;
  const groups = 132 * 16;
  const subgroups = groups * (128 / MATRIX_THREADS);
  const kernel = await createKernel(gpu, {
    label: "matrix roof",
    code: matrixCode(),
    bindings: ["read", "read_write"],
  });
  // Halves of about 1e-3 to 2e-3 with random low bits: the power that real operands draw.
  const operands = Uint32Array.from({ length: 2 * MATRIX_SIDE * MATRIX_SIZE ** 2 * 0.5 }, () => {
    const half = () => 0x1400 + Math.floor(Math.random() * 0x400) + (Math.random() < 0.5 ? 0x8000 : 0);
    return half() + half() * 65_536;
  });
  const buffers = [
    uploadStorage(gpu, "operands", operands),
    createStorage(gpu, "sums", subgroups * MATRIX_SIDE ** 2 * MATRIX_SIZE ** 2 * 4),
  ];
  const time = await milliseconds(gpu, { kernel, buffers, groups }, plan);
  return (subgroups * MATRIX_STEPS * MATRIX_SIDE ** 2 * 2 * MATRIX_SIZE ** 3) / time / 1e9;
}

/** A chip that has idled takes most of a second to reach its clock again. */
const FIRST_WARM_SECONDS = 1;

/** Measures all of them; a few seconds. */
export async function measureRoofs(gpu: Gpu, plan: TimingPlan): Promise<DeviceRoofs> {
  if (plan.warmSeconds > 0) await multiplyAddRoof(gpu, { ...plan, warmSeconds: FIRST_WARM_SECONDS });
  return {
    readGb: await readRoof(gpu, plan),
    copyGb: await copyRoof(gpu, plan),
    multiplyAddTflops: await multiplyAddRoof(gpu, plan),
    matrixTflops: await matrixRoof(gpu, plan),
  };
}
