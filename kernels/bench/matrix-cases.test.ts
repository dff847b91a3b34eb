import { expect, test } from "vitest";
import { openGpu } from "../src/index.ts";
import { isFailure } from "./bench-result.ts";
import { runCases } from "./case-run.ts";
import { SOFTWARE_TIMING } from "./case-timing.ts";
import { decodeLinearCases } from "./cases/decode-linear.ts";
import { gemmCases } from "./cases/gemm.ts";

test("matrix cases are right as they are written out for other devices", async () => {
  const gpu = await openGpu({ profile: "hardware", unchecked: false });
  const roofs = { readGb: 1, copyGb: 1, multiplyAddTflops: 1, matrixTflops: 1 };
  const cases = [decodeLinearCases, gemmCases].flatMap((list) => list("tiny"));
  const rows = await runCases(cases, {
    gpu,
    roofs,
    timing: SOFTWARE_TIMING,
    deadline: Number.POSITIVE_INFINITY,
    onResult: () => undefined,
  });
  expect(rows.filter((row) => isFailure(row) || row.skipped !== undefined)).toEqual([]);
  await gpu.close();
});
