import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { jsonOf } from "../testing/json-command.ts";

const ENGLISH = new URL("../../../integration-tests/golden/english.txt", import.meta.url);

interface Evaluation {
  readonly model: string;
  readonly results: readonly { kvFormat: string; perplexity: number; tokens: number; bitsPerElement: number }[];
}

/** The text's first characters, as a file. */
function excerpt(characters: number): string {
  const path = join(mkdtempSync(join(tmpdir(), "kivimesh-eval-")), "text.txt");
  writeFileSync(path, readFileSync(ENGLISH, "utf8").slice(0, characters));
  return path;
}

async function evaluate(...options: string[]): Promise<Evaluation> {
  return (await jsonOf("eval", "perplexity", ...options, "--json")) as Evaluation;
}

describe("eval perplexity --json", () => {
  it("has a result of each format over whole windows, the tail dropped", async () => {
    const dummy = ["--load-format", "dummy", "--architecture", "tiny-llama"];
    // The dummy's tokenizer takes bytes: two windows of 160 tokens and a tail.
    const text = ["--text", excerpt(350), "--context", "160"];
    const evaluation = await evaluate(...dummy, ...text, "--kv-format", "f16,kivi2r");
    const result = (kvFormat: string, bitsPerElement: unknown) => {
      return { kvFormat, perplexity: expect.any(Number), tokens: 2 * 159, bitsPerElement };
    };
    expect(evaluation).toEqual({
      model: "tiny-llama",
      results: [result("f16", 16), result("kivi2r", expect.closeTo(3, 0))],
    });
    const [f16, kivi2r] = evaluation.results.map(({ perplexity }) => perplexity);
    // Random weights know nothing: about as many choices as there are tokens.
    expect(f16).toBeGreaterThan(50);
    expect(f16).toBeLessThan(1000);
    expect(kivi2r).not.toBe(f16);
  }, 120_000);

  it("orders the formats on the real model by what they lose", async () => {
    const model = process.env.KIVIMESH_TEST_MODEL_PATH;
    expect(model, "KIVIMESH_TEST_MODEL_PATH (npm test sets it)").toBeDefined();
    const text = ["--text", excerpt(1500), "--context", "256"];
    const formats = ["f16", "kivi4", "kivi2r", "kivi2"];
    const { results } = await evaluate("--model", model ?? "", ...text, "--kv-format", formats.join(","));
    expect(results.map(({ kvFormat }) => kvFormat)).toEqual(formats);
    expect(results.every(({ tokens }) => tokens === results[0]?.tokens && tokens % 255 === 0)).toBe(true);
    expect(results.map(({ bitsPerElement }) => Number(bitsPerElement.toFixed(2)))).toEqual([16, 5, 3.04, 3]);
    const [f16 = 0, kivi4 = 0, kivi2r = 0, kivi2 = 0] = results.map(({ perplexity }) => perplexity);
    expect(f16).toBeGreaterThan(10);
    expect(f16).toBeLessThan(100);
    expect(Math.abs(kivi4 / f16 - 1)).toBeLessThan(0.02);
    expect(kivi2r).toBeGreaterThan(f16);
    expect(kivi2).toBeGreaterThan(kivi2r);
    expect(kivi2 / f16).toBeLessThan(1.5);
  }, 240_000);
});
