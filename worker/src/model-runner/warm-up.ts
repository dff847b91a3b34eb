/** Runs every pipeline once: drivers compile at the first dispatch, and the first request should not wait for that. */
import type { ModelRunner, SamplingParameters } from "./model-runner.ts";

const GREEDY: SamplingParameters = { temperature: 0, topK: 0, topP: 1, seed: 0n };
const SAMPLED: SamplingParameters = { temperature: 1, topK: 10, topP: 0.9, seed: 0n };

/** Uses slots 0 and 1 and the first pages; leaves nothing that a later step reads. */
export async function warmUp(runner: ModelRunner): Promise<void> {
  const { residualTokens: window, blockTokens } = runner.kv;
  const { maxContextTokens, maxSequences, numPages } = runner.limits;
  const blocks = window / blockTokens;
  const full = maxContextTokens >= window && numPages >= blocks;
  const first = Array.from({ length: full ? blocks : 0 }, (_, page) => page);
  // A full window is prefilled and sealed; a second one is completed, and sealed, by a decode row.
  const tokens = new Uint32Array(full ? window : Math.min(window - 1, maxContextTokens));
  await runner.step({
    prefill: [{ slot: 0, tokens, position: 0, pageTable: first, sample: SAMPLED }],
    decode: [],
  });
  if (maxContextTokens < 2 * window || numPages < 2 * blocks) {
    await runner.step({
      prefill: [],
      decode: [{ slot: 0, token: 0, position: 0, pageTable: [], sample: GREEDY }],
    });
    return;
  }
  const both = Array.from({ length: 2 * blocks }, (_, page) => page);
  const decode = { token: 0, position: 2 * window - 1, pageTable: both, sample: GREEDY };
  await runner.step({ prefill: [], decode: [{ ...decode, slot: 0 }] });
  if (maxSequences < 2) return;
  await runner.step({
    prefill: [],
    decode: [
      { ...decode, slot: 0, position: window, pageTable: first },
      { ...decode, slot: 1, position: 0, pageTable: [] },
    ],
  });
}
