/** Runs a server until it is told to end or fails, then ends it in order. */
import type { Output } from "./output.ts";

/** A terminal and npm may both send the same Ctrl-C; a second one counts only after this. */
const REPEATED_SIGNAL_MS = 1_000;
const SIGNALS = ["SIGINT", "SIGTERM"] as const;

export interface Stoppable {
  /** Resolves if it failed by itself. */
  readonly failed?: Promise<Error>;
  drain(graceMs: number): Promise<void>;
}

/** An abort signal that SIGINT and SIGTERM raise; the second one ends the process at once. */
export function terminationSignal(output: Output): { signal: AbortSignal; dispose(): void } {
  const controller = new AbortController();
  let firstAt = 0;
  const onSignal = () => {
    if (firstAt === 0) {
      firstAt = Date.now();
      controller.abort();
    } else if (Date.now() - firstAt > REPEATED_SIGNAL_MS) {
      output.notice("ending at once");
      process.exit(1);
    }
  };
  for (const name of SIGNALS) process.on(name, onSignal);
  return {
    signal: controller.signal,
    dispose() {
      for (const name of SIGNALS) process.off(name, onSignal);
    },
  };
}

/** Resolves when the signal is raised; at once where it is already. */
export function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

/**
 * Serves until the signal or a failure, then drains.
 * @throws the failure, after draining.
 */
export async function serveUntil(signal: AbortSignal, server: Stoppable, graceMs: number): Promise<void> {
  const failure = await Promise.race([aborted(signal), server.failed ?? new Promise<never>(() => {})]);
  await server.drain(graceMs);
  if (failure instanceof Error) throw failure;
}
