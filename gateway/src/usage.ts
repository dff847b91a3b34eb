import { create } from "@bufbuild/protobuf";
import { type Usage, UsageSchema } from "@kivimesh/proto";

/** What the gateway knows of a request's end by itself. */
export interface UsageFacts {
  readonly promptTokens: number;
  readonly completionTokens: number;
  readonly worker: string;
  readonly kvFormat: string;
}

/**
 * The usage a client sees: the gateway's own token counts with the worker's sources, trimmed so that they sum to the
 * prompt. A resumed attempt also recomputes tokens of the answer; what exceeds the prompt is taken from `computed` first.
 * Prompt tokens that the worker says nothing about count as computed.
 */
export function clientUsage(facts: UsageFacts, reported: Usage | undefined): Usage {
  const source = reported?.kivimesh?.promptTokensBySource;
  const counts = {
    computed: source?.computed ?? 0,
    cachestore: source?.cachestore ?? 0,
    peer: source?.peer ?? 0,
    gpu: source?.gpu ?? 0,
  };
  let excess = counts.computed + counts.cachestore + counts.peer + counts.gpu - facts.promptTokens;
  for (const name of ["computed", "cachestore", "peer", "gpu"] as const) {
    const taken = Math.min(counts[name], Math.max(0, excess));
    counts[name] -= taken;
    excess -= taken;
  }
  counts.computed += Math.max(0, -excess);
  return create(UsageSchema, {
    promptTokens: facts.promptTokens,
    completionTokens: facts.completionTokens,
    cachedTokens: counts.gpu + counts.peer + counts.cachestore,
    kivimesh: {
      worker: facts.worker,
      kvFormat: reported?.kivimesh?.kvFormat || facts.kvFormat,
      promptTokensBySource: counts,
      kvF16Bytes: reported?.kivimesh?.kvF16Bytes ?? 0n,
      kvStoredBytes: reported?.kivimesh?.kvStoredBytes ?? 0n,
      fetchedBytes: reported?.kivimesh?.fetchedBytes ?? 0n,
    },
  });
}
