import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { create } from "webgpu";
import { type Gpu, openGpu } from "./device.ts";
import { createSampler, sampleVariant } from "./sample.ts";
import { type KernelCheck, selfTest } from "./self-test.ts";
import {
  HALF_CHECK,
  HALF_WGSL,
  halfCheck,
  matrixCheck,
  matrixCheckWgsl,
  SUBGROUP_CHECK,
  SUBGROUP_WGSL,
  subgroupCheck,
} from "./self-test-features.ts";
import { NORM_CHECK } from "./self-test-kernels.ts";
import { linearCheck } from "./self-test-layers.ts";

/** The emulation as if the device had matrices. */
const EMULATED = matrixCheckWgsl("emulated");

describe("self-test", () => {
  let gpu: Gpu;
  beforeAll(async () => {
    const opened = await openGpu();
    gpu = { ...opened, features: { ...opened.features, subgroupMatrix: true } };
  });
  afterAll(() => gpu.close());

  async function refused(...checks: KernelCheck[]): Promise<{ gpu: Gpu; warnings: string[] }> {
    const warnings: string[] = [];
    return { gpu: await selfTest(gpu, { checks, warn: (message) => warnings.push(message) }), warnings };
  }

  test("a device that is right keeps everything", async () => {
    const tested = await refused(SUBGROUP_CHECK, HALF_CHECK, matrixCheck(EMULATED), NORM_CHECK);
    expect(tested.warnings).toEqual([]);
    expect(tested.gpu).toBe(gpu);
  });

  test("linear layers by matrices are right where the emulation is", async () => {
    // Only a GPU lays weights out for matrices.
    const hardware: Gpu = { ...gpu, profile: "hardware" };
    expect(await selfTest(hardware, { checks: [linearCheck("emulated")] })).toBe(hardware);
  });

  test.each([
    ["lanes in another order", "output[at + 1u] = lane", "output[at + 1u] = lane ^ 1u"],
    ["a shuffle of another lane", "subgroupShuffleXor(value, 2u)", "subgroupShuffleXor(value, 4u)"],
    ["a sum of one lane too few", "subgroupAdd(value)", "subgroupAdd(select(value, 0u, lane == 3u))"],
    ["an inclusive prefix sum", "subgroupExclusiveAdd(value)", "subgroupInclusiveAdd(value)"],
  ])("subgroups are off after %s", async (_, right, wrong) => {
    expect(SUBGROUP_WGSL).toContain(right);
    const { gpu: derived, warnings } = await refused(subgroupCheck(SUBGROUP_WGSL.replace(right, wrong)));
    expect(derived.features).toEqual({
      ...gpu.features,
      subgroups: false,
      subgroupSize: 1,
      subgroupMatrix: false,
    });
    expect(derived.fallbacks?.map(({ variant }) => variant)).toEqual(["subgroups"]);
    expect(warnings.join()).toMatch(/gets "subgroups" wrong and runs without subgroups: word \d+/);
  });

  test.each([
    [
      "flushes subnormals",
      "bitcast<u32>(a * b)",
      "bitcast<u32>(select(a * b, vec2<f16>(), abs(a) < vec2<f16>(6e-5h)))",
    ],
    ["rounds sums towards zero", "bitcast<u32>(a + b)", "(bitcast<u32>(a + b) & 0xfffefffeu)"],
  ])("f16 is off where a driver %s", async (_, right, wrong) => {
    expect(HALF_WGSL).toContain(right);
    const { gpu: derived } = await refused(halfCheck(HALF_WGSL.replace(right, wrong)));
    expect(derived.features).toEqual({ ...gpu.features, shaderF16: false, subgroupMatrix: false });
  });

  test.each([
    ["sums in f16", "result[i] = sum;", "result[i] = unpack2x16float(pack2x16float(vec2f(sum))).x;"],
    ["swaps a matrix's lines", "* 8u, (2u) * 8u)", "* 8u, (2u) * 8u + 1u)"],
  ])("matrices are off where a driver %s", async (_, right, wrong) => {
    const broken = EMULATED.replaceAll(right, wrong);
    expect(broken).not.toBe(EMULATED);
    const { gpu: derived } = await refused(SUBGROUP_CHECK, matrixCheck(broken));
    expect(derived.features).toEqual({ ...gpu.features, subgroupMatrix: false });
    expect(derived.fallbacks?.map(({ variant }) => variant)).toEqual(["subgroup matrix"]);
  });

  test("a kernel that does not compile is refused, with the driver's words", async () => {
    const { gpu: derived, warnings } = await refused(matrixCheck("fn main() { nonsense }"));
    expect(derived.features.subgroupMatrix).toBe(false);
    expect(warnings.join()).toMatch(/self-test matrix/);
  });

  test("what stands on a refused feature runs without it", async () => {
    const { gpu: derived } = await refused(subgroupCheck(SUBGROUP_WGSL.replace("subgroupMax(value)", "0u")));
    const hardware: Gpu = { ...derived, profile: "hardware" };
    expect(sampleVariant({ ...gpu, profile: "hardware" })).toBe("slices");
    expect(sampleVariant(hardware)).toBe("rows");
    await expect(createSampler(hardware, { vocabulary: 10, maxRows: 1 })).resolves.toBeDefined();
  });

  test("checks of features that are not offered are left out; software drivers are not tested by default", async () => {
    const plain: Gpu = { ...gpu, features: { ...gpu.features, subgroupMatrix: false } };
    expect(await selfTest(plain, { checks: [matrixCheck("nonsense")] })).toBe(plain);
    expect(await selfTest(gpu)).toBe(gpu);
  });
});

test("the device's matrix text is valid", async () => {
  const instance = create(["backend=null", "enable-dawn-features=allow_unsafe_apis"]);
  const adapter = await instance.requestAdapter();
  const features = ["subgroups", "shader-f16", "chromium-experimental-subgroup-matrix"] as GPUFeatureName[];
  const device = await adapter?.requestDevice({ requiredFeatures: features });
  const info = await device?.createShaderModule({ code: matrixCheckWgsl("device") }).getCompilationInfo();
  expect(info?.messages.filter(({ type }) => type === "error").map(({ message }) => message)).toEqual([]);
  device?.destroy();
});
