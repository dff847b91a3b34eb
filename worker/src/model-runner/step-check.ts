/** Refuses plans that a step cannot run, before anything is written to the GPU. */
import { ClusterError } from "@kivimesh/proto";
import type { KvGeometry, RunnerLimits, SamplingParameters, StepPlan } from "./model-runner.ts";

function refuse(message: string): ClusterError {
  return new ClusterError("INVALID_ARGUMENT", `step: ${message}`);
}

/** @throws ClusterError INVALID_ARGUMENT saying which row or limit. */
export function checkStep(plan: StepPlan, limits: RunnerLimits, kv: KvGeometry): void {
  const { prefill, decode, decodeSteps = 1 } = plan;
  if (!Number.isInteger(decodeSteps) || decodeSteps < 1 || decodeSteps > limits.maxDecodeSteps) {
    throw refuse(`${decodeSteps} decode steps, must be 1 to ${limits.maxDecodeSteps}`);
  }
  const rows = prefill.reduce((sum, chunk) => sum + chunk.tokens.length, 0);
  if (rows > limits.maxPrefillRows) throw refuse(`${rows} prefill rows, at most ${limits.maxPrefillRows}`);
  const slots = new Set<number>();
  const checkSlot = ({ slot }: { readonly slot: number }) => {
    if (!Number.isInteger(slot) || slot < 0 || slot >= limits.maxSequences) {
      throw refuse(`slot ${slot} is not in 0..${limits.maxSequences - 1}`);
    }
    if (slots.has(slot)) throw refuse(`slot ${slot} appears twice`);
    slots.add(slot);
  };
  prefill.forEach(checkSlot);
  decode.forEach(checkSlot);
  for (const { slot, tokens, position, pageTable, sample, score } of prefill) {
    if (tokens.length === 0) throw refuse(`slot ${slot} has an empty chunk`);
    if (position % kv.residualTokens !== 0) {
      throw refuse(`slot ${slot} starts a chunk at ${position}, not a multiple of ${kv.residualTokens}`);
    }
    for (const token of tokens) checkToken(slot, token, limits);
    checkRange(slot, position, tokens.length, pageTable, limits, kv);
    if (sample !== undefined) checkSampling(slot, sample);
    if (score !== undefined && score.length !== tokens.length) {
      throw refuse(`slot ${slot} has ${score.length} score targets for ${tokens.length} tokens`);
    }
    for (const token of score ?? []) checkToken(slot, token, limits);
  }
  for (const { slot, token, position, pageTable, sample, returnLogits } of decode) {
    if (token !== undefined) checkToken(slot, token, limits);
    checkRange(slot, position, decodeSteps, pageTable, limits, kv);
    checkSampling(slot, sample);
    if (returnLogits === true && decodeSteps > 1) throw refuse(`slot ${slot} asks for logits of ${decodeSteps} steps`);
  }
}

function checkToken(slot: number, token: number, limits: RunnerLimits): void {
  if (Number.isInteger(token) && token >= 0 && token < limits.vocabulary) return;
  throw refuse(`slot ${slot} has token ${token}; the vocabulary ends at ${limits.vocabulary - 1}`);
}

function checkRange(
  slot: number,
  position: number,
  tokens: number,
  pageTable: readonly number[],
  limits: RunnerLimits,
  kv: KvGeometry,
): void {
  const end = position + tokens;
  if (!Number.isInteger(position) || position < 0 || end > limits.maxContextTokens) {
    throw refuse(`slot ${slot} reaches position ${end - 1}; the context ends at ${limits.maxContextTokens - 1}`);
  }
  const frontier = end - (end % kv.residualTokens);
  if (pageTable.length * kv.blockTokens < frontier) {
    throw refuse(`slot ${slot} has ${pageTable.length} pages for ${frontier} sealed tokens`);
  }
  if (pageTable.length > limits.maxPagesPerSequence) {
    throw refuse(`slot ${slot} has ${pageTable.length} pages, at most ${limits.maxPagesPerSequence}`);
  }
  for (const page of pageTable) {
    if (Number.isInteger(page) && page >= 0 && page < limits.numPages) continue;
    throw refuse(`slot ${slot} names page ${page}; the pool has ${limits.numPages}`);
  }
}

function checkSampling(slot: number, { temperature, topK, topP, seed }: SamplingParameters): void {
  const fits = temperature >= 0 && Number.isFinite(temperature) && Number.isInteger(topK) && topK >= 0;
  if (fits && topP > 0 && topP <= 1 && seed >= 0n && seed < 1n << 64n) return;
  throw refuse(
    `slot ${slot} samples with temperature ${temperature}, topK ${topK}, topP ${topP}, seed ${seed}: they must be ≥ 0, ≥ 0, in (0, 1] and a u64`,
  );
}
