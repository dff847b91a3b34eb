import { expect, test } from "vitest";
import { create, globals } from "webgpu";
import { matrixCode } from "./roof-kernels.wgsl.ts";

test("the matrix roof's text is valid where subgroup matrices are offered", async () => {
  Object.assign(globalThis, globals);
  // No driver behind it: this only checks the text.
  const instance = create(["backend=null", "enable-dawn-features=allow_unsafe_apis"]);
  const adapter = await instance.requestAdapter();
  const wanted = ["shader-f16", "subgroups", "chromium-experimental-subgroup-matrix"] as GPUFeatureName[];
  const device = await adapter?.requestDevice({ requiredFeatures: wanted });
  const info = await device?.createShaderModule({ code: matrixCode() }).getCompilationInfo();
  expect(info?.messages.filter(({ type }) => type === "error").map(({ message }) => message)).toEqual([]);
});
