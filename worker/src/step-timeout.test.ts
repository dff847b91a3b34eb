import { expect, it } from "vitest";
import { stepTimeoutMs, within } from "./step-timeout.ts";

it("gives a step's result, its failure, or DEVICE_LOST when it does not end in time", async () => {
  expect(await within(Promise.resolve(7), 1_000)).toBe(7);
  await expect(within(Promise.reject(new RangeError("bad plan")), 1_000)).rejects.toThrow("bad plan");
  await expect(within(new Promise(() => undefined), 20)).rejects.toMatchObject({ code: "DEVICE_LOST" });
});

it("waits for a software driver longer than 128 rows of a 7B model take on two cores", () => {
  const secondsOf128Rows = 140;
  expect(stepTimeoutMs.software).toBeGreaterThan(10 * secondsOf128Rows * 1_000);
  expect(stepTimeoutMs.hardware).toBeLessThan(stepTimeoutMs.software);
});
