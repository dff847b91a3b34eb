/** Sizes of a bench: how many requests, how long. */
import { InvalidArgumentError } from "commander";

/** Requests that are all there at the start. */
export interface Workload {
  readonly requests: number;
  readonly promptTokens: number;
  /** Of each answer; nothing ends earlier. */
  readonly outputTokens: number;
}

/** Reads "1000x161+338": 1000 requests of 161 prompt tokens and 338 output tokens. */
export function workload(text: string): Workload {
  const match = /^(\d+)[x×](\d+)\+(\d+)$/.exec(text.trim());
  const [requests = 0, promptTokens = 0, outputTokens = 0] = (match ?? []).slice(1).map(Number);
  if (requests < 1 || promptTokens < 1 || outputTokens < 1) {
    throw new InvalidArgumentError(
      `expected REQUESTSxPROMPT+OUTPUT tokens, all at least 1, such as 1000x161+338, got "${text}"`,
    );
  }
  return { requests, promptTokens, outputTokens };
}

export function workloadName({ requests, promptTokens, outputTokens }: Workload): string {
  return `${requests}x${promptTokens}+${outputTokens}`;
}

/** Token ids that no two prompts share, so that no prefix is found again. Multiplicative hash of Knuth, vol. 3, §6.4. */
export function benchPrompt(seed: number, length: number, vocabulary: number): Uint32Array {
  return Uint32Array.from(
    { length },
    (_, index) => (Math.imul(seed * 65_537 + index + 1, 2_654_435_761) >>> 8) % vocabulary,
  );
}
