import { describe, expect, it } from "vitest";
import { benchPrompt, workload, workloadName } from "./workload.ts";

describe("a workload's text", () => {
  it.each(["1000x161+338", "1x1+1"])("%s is read and written", (text) => {
    expect(workloadName(workload(text))).toBe(text);
  });

  it.each(["", "1000", "1000x161", "0x161+338", "8x0+1", "8x1+0", "8x1+1+1", "-1x2+3", "8 x 1 + 2"])(
    "%j is refused with what is expected",
    (text) => {
      expect(() => workload(text)).toThrow(/REQUESTSxPROMPT\+OUTPUT/);
    },
  );
});

describe("prompts of a bench", () => {
  it("are in the vocabulary and share no first token", () => {
    const prompts = Array.from({ length: 16 }, (_, seed) => benchPrompt(seed, 300, 49_152));
    expect(prompts.flatMap((prompt) => [...prompt]).every((token) => token < 49_152)).toBe(true);
    expect(new Set(prompts.map((prompt) => prompt[0])).size).toBe(16);
    expect(new Set(prompts[0]).size).toBeGreaterThan(200);
  });
});
