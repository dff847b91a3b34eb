/**
 * Perplexity of SmolLM2 under each KV format, beside the golden simulation of the same policies. Run by hand:
 *
 *     npx tsx --conditions=source worker/src/model-runner/bench/kv-perplexity.ts [FORMAT ...]
 *
 * Prints one JSON line a format.
 */
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
import { openGpu } from "@kivimesh/kernels";
import { loadModel } from "../../model/load-model.ts";
import { smollm2Path } from "../../model/testing/smollm2.ts";
import { openModelRunner } from "../open-model-runner.ts";
import { textPerplexity } from "../perplexity.ts";

interface Golden {
  readonly context: number;
  readonly formats: Readonly<Record<string, { perplexity: number; relativeToF16: number }>>;
}

const folder = new URL("../../../../integration-tests/golden/", import.meta.url);
const golden: Golden = JSON.parse(readFileSync(new URL("kv_policies.json", folder), "utf8"));
const formats = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(golden.formats);
const model = await loadModel({ path: smollm2Path() });
const { tokenizerJson, tokenizerConfigJson } = model.tokenizer;
const tokenizer = new Tokenizer(JSON.parse(tokenizerJson), JSON.parse(tokenizerConfigJson));
const tokens = Uint32Array.from(tokenizer.encode(readFileSync(new URL("english.txt", folder), "utf8")).ids);
const gpu = await openGpu();
for (const kvFormat of formats) {
  const maxContextTokens = golden.context;
  const runner = await openModelRunner({ model, gpu, kvFormat, maxContextTokens, maxSequences: 2 });
  const started = performance.now();
  const result = await textPerplexity(runner, tokens, { contextTokens: golden.context });
  const seconds = (performance.now() - started) / 1000;
  const expected = golden.formats[kvFormat];
  const ratio = expected === undefined ? undefined : result.perplexity / expected.perplexity;
  const { bitsPerElement } = runner.kv;
  console.log(JSON.stringify({ kvFormat, bitsPerElement, ...result, golden: expected?.perplexity, ratio, seconds }));
  await runner.close();
}
model.close();
await gpu.close();
