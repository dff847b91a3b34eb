import { describe, expect, it } from "vitest";
import { benchPrompt, ratesOf } from "./bench-engine.ts";

describe("rates of a bench", () => {
  it("counts decode from the moment when every sequence has its first token", () => {
    const rates = ratesOf(
      [
        [1, 1.5, 2, 3],
        [2, 2.5, 3, 4],
      ],
      100,
    );
    expect(rates).toEqual({
      prefillTokensPerSecond: 100,
      decodeTokensPerSecond: 4 / 2,
      ttftSeconds: 2,
      totalSeconds: 4,
    });
  });

  it("has no decode rate for a single token", () => {
    expect(ratesOf([[0.5]], 10)).toMatchObject({ prefillTokensPerSecond: 20, decodeTokensPerSecond: 0 });
  });
});

describe("prompts of a bench", () => {
  it("are in the vocabulary and share no first token", () => {
    const prompts = Array.from({ length: 16 }, (_, seed) => benchPrompt(seed, 300, 49_152));
    expect(prompts.flatMap((prompt) => [...prompt]).every((token) => token < 49_152)).toBe(true);
    expect(new Set(prompts.map((prompt) => prompt[0])).size).toBe(16);
    expect(new Set(prompts[0]).size).toBeGreaterThan(200);
  });
});
