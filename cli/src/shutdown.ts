/** Runs a server until it is told to end or fails, then ends it in order. */
import type { Output } from "./output.ts";

/** A terminal and npm may both send the same Ctrl-C; a second one counts only after this. */
const REPEATED_SIGNAL_MS = 1_000;
/** What closing may take after the streams' grace. */
const CLOSING_MS = 2_000;
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

/** Waits for `work`, but no longer than `limitMs`. @returns whether it ended. */
async function within(limitMs: number, work: Promise<void>): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), limitMs);
  });
  try {
    return await Promise.race([work.then(() => true), late]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Serves until the signal or a failure, then drains: streams get `graceMs`, closing a little more. Whatever still hangs
 * then ends with the process.
 * @throws the failure, after draining.
 */
export async function serveUntil(
  signal: AbortSignal,
  server: Stoppable,
  graceMs: number,
  output: Output,
): Promise<void> {
  const failure = await Promise.race([aborted(signal), server.failed ?? new Promise<never>(() => {})]);
  const limitMs = graceMs + CLOSING_MS;
  if (!(await within(limitMs, server.drain(graceMs)))) output.notice(`not closed after ${limitMs} ms; ending anyway`);
  if (failure instanceof Error) throw failure;
}
