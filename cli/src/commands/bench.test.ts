import { expect, it } from "vitest";
import { jsonOf } from "../testing/json-command.ts";

it("bench engine --json has every promised field", async () => {
  const dummy = ["--load-format", "dummy", "--architecture", "tiny-llama", "--kv-format", "kivi4"];
  const size = ["--batch", "2", "--prompt-tokens", "140", "--output-tokens", "5"];
  const result = await jsonOf("bench", "engine", ...dummy, ...size, "--json");
  expect(result).toEqual({
    device: expect.stringMatching(/\S/),
    model: "tiny-llama",
    kvFormat: "kivi4",
    batch: 2,
    promptTokens: 140,
    outputTokens: 5,
    prefillTokensPerSecond: expect.any(Number),
    decodeTokensPerSecond: expect.any(Number),
    ttftSeconds: expect.any(Number),
    totalSeconds: expect.any(Number),
    peakGpuBytes: {
      weights: expect.any(Number),
      kv: expect.any(Number),
      activations: expect.any(Number),
      other: expect.any(Number),
    },
  });
  const rates = result as {
    prefillTokensPerSecond: number;
    decodeTokensPerSecond: number;
    ttftSeconds: number;
    totalSeconds: number;
    peakGpuBytes: Record<string, number>;
  };
  expect(rates.prefillTokensPerSecond).toBeCloseTo((2 * 140) / rates.ttftSeconds, 3);
  expect(rates.decodeTokensPerSecond).toBeGreaterThan(0);
  expect(rates.totalSeconds).toBeGreaterThan(rates.ttftSeconds);
  for (const part of ["weights", "kv", "activations"]) expect(rates.peakGpuBytes[part], part).toBeGreaterThan(0);
}, 120_000);
