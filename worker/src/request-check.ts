import { ClusterError } from "@kivimesh/proto";
import type { GenerationRequest } from "./generation.ts";
import type { RunnerLimits } from "./model/index.ts";

/**
 * Checks what came from outside, so that one bad request cannot fail a step that it shares with others.
 * @param capacityTokens longest sequence that the page pool can hold alone.
 * @throws ClusterError INVALID_ARGUMENT or CONTEXT_LENGTH_EXCEEDED.
 */
export function checkRequest(request: GenerationRequest, limits: RunnerLimits, capacityTokens: number): void {
  const { tokens, promptTokens, maxTokens, tenantNamespace } = request;
  if (!(Number.isInteger(promptTokens) && promptTokens >= 1 && promptTokens <= tokens.length)) {
    throw invalid(
      "prompt_tokens",
      `is ${promptTokens} of ${tokens.length} tokens: at least one prompt token is needed`,
    );
  }
  if (!(Number.isInteger(maxTokens) && maxTokens >= 1)) {
    throw invalid("max_tokens", `is ${maxTokens}: it must be at least 1`);
  }
  const beyond = tokens.find((token) => token >= limits.vocabulary);
  if (beyond !== undefined) {
    throw invalid("tokens", `contains ${beyond}: the vocabulary ends at ${limits.vocabulary - 1}`);
  }
  if (tenantNamespace.length !== 32) {
    throw invalid("tenant_namespace", `has ${tenantNamespace.length} bytes, not 32`);
  }
  checkSampling(request);
  const allowed = Math.min(limits.maxContextTokens, capacityTokens);
  if (tokens.length >= allowed) {
    throw new ClusterError(
      "CONTEXT_LENGTH_EXCEEDED",
      `${tokens.length} tokens leave no room for an answer: this worker holds ${allowed} tokens of one sequence`,
      { parameter: "messages" },
    );
  }
}

function checkSampling({ sampling }: GenerationRequest): void {
  const { temperature, topK, topP, seed } = sampling;
  if (!(temperature >= 0 && Number.isFinite(temperature))) {
    throw invalid("temperature", `is ${temperature}: it must be finite and not negative`);
  }
  if (!(Number.isInteger(topK) && topK >= 0)) throw invalid("top_k", `is ${topK}: it must be 0 or more`);
  if (!(topP > 0 && topP <= 1)) throw invalid("top_p", `is ${topP}: it must be in (0, 1]`);
  if (!(seed >= 0n && seed < 1n << 64n)) throw invalid("seed", "must be an unsigned 64-bit number");
}

function invalid(parameter: string, what: string): ClusterError {
  return new ClusterError("INVALID_ARGUMENT", `${parameter} ${what}`, { parameter });
}
