import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { create } from "webgpu";
import { embeddingWgsl } from "./embedding.wgsl.ts";
import { GGML_TYPES } from "./ggml-quants.ts";
import { linearColumnsWgsl } from "./linear-columns.wgsl.ts";
import { linearRowsDecodeWgsl, linearRowsPrefillWgsl } from "./linear-rows.wgsl.ts";
import { rmsNormWgsl } from "./rms-norm.wgsl.ts";
import { samplePickWgsl, sampleScanWgsl } from "./sample.wgsl.ts";
import { siluMulThreads, siluMulWgsl } from "./silu-mul.wgsl.ts";
import { weightEncoding } from "./weight-encoding.ts";

/**
 * WebGPU's guaranteed limits (256 threads, 8 storage buffers, 16 KiB workgroup memory) are below those of every driver
 * that is served: a pipeline that a device with only these accepts runs on all of them.
 */
describe("every dense kernel fits WebGPU's default limits", () => {
  const gpu = create([]);
  let device: GPUDevice;
  beforeAll(async () => {
    const adapter = await gpu.requestAdapter();
    if (adapter === null) throw new Error("no adapter");
    device = await adapter.requestDevice({ requiredFeatures: ["subgroups" as GPUFeatureName] });
  });
  afterAll(() => device.destroy());

  async function compile(code: string): Promise<string | undefined> {
    device.pushErrorScope("validation");
    const module = device.createShaderModule({ code });
    device.createComputePipeline({ layout: "auto", compute: { module } });
    return (await device.popErrorScope())?.message;
  }

  const encodings = new Map(GGML_TYPES.map((type) => [JSON.stringify(weightEncoding(type)), weightEncoding(type)]));

  test.each([...encodings.values()])("$format $scales $group", async (encoding) => {
    expect(await compile(linearColumnsWgsl(encoding, { lanes: 8, tileRows: 4, tileColumns: 8 }))).toBeUndefined();
    expect(await compile(linearRowsPrefillWgsl(encoding))).toBeUndefined();
    for (const subgroups of [true, false]) {
      expect(await compile(linearRowsDecodeWgsl(encoding, { outputs: 4, rows: 4 }, subgroups))).toBeUndefined();
    }
    for (const layout of ["columns", "rows"] as const) {
      expect(await compile(embeddingWgsl(encoding, layout, 100, 256))).toBeUndefined();
    }
  });

  test("norm, activation, sampling", async () => {
    const norm = { hidden: 4096, epsilon: 1e-5, gathered: true } as const;
    const activation = { width: 11008, output: "f16" } as const;
    for (const code of [
      rmsNormWgsl({ ...norm, output: "f32", variant: "loops" }),
      rmsNormWgsl({ ...norm, output: "f16", variant: "registers" }),
      siluMulWgsl({ ...activation, threads: siluMulThreads("hardware") }),
      sampleScanWgsl(),
      samplePickWgsl(),
    ]) {
      expect(await compile(code)).toBeUndefined();
    }
  });

  test("the check can fail", async () => {
    expect(await compile("@compute @workgroup_size(512) fn main() {}")).toMatch(/512/);
  });
});
