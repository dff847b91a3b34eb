/** Runs a server until it is told to end or fails, then ends it in order. */
import { constants } from "node:os";
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

/** The end that was asked for from outside. */
export interface Termination {
  readonly signal: AbortSignal;
  /** Which one came; undefined before. */
  signalName(): NodeJS.Signals | undefined;
  dispose(): void;
}

/** An abort signal that SIGINT and SIGTERM raise; the second one ends the process at once. */
export function terminationSignal(output: Output): Termination {
  const controller = new AbortController();
  let firstAt = 0;
  let name: NodeJS.Signals | undefined;
  const onSignal = (received: NodeJS.Signals) => {
    if (firstAt === 0) {
      firstAt = Date.now();
      name = received;
      controller.abort();
    } else if (Date.now() - firstAt > REPEATED_SIGNAL_MS) {
      output.notice("ending at once");
      endBySignal(received);
    }
  };
  for (const each of SIGNALS) process.on(each, onSignal);
  return {
    signal: controller.signal,
    signalName: () => name,
    dispose() {
      for (const each of SIGNALS) process.off(each, onSignal);
    },
  };
}

/** Resolves when the signal is raised; at once where it is already. */
function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

/**
 * Ends the process by the signal itself. An engine thread that is opening its GPU cannot be ended in order: the driver's
 * binding calls back into a thread that is going away, and aborts.
 */
function endBySignal(name: NodeJS.Signals): void {
  process.emit("exit", 128 + constants.signals[name]);
  process.removeAllListeners(name);
  process.kill(process.pid, name);
}

/** Waits for `starting`; a signal that comes before it is done ends the process at once. */
export async function startedUnlessEnded<T>(termination: Termination, starting: Promise<T>): Promise<T> {
  let done = false;
  void aborted(termination.signal).then(() => {
    if (!done) endBySignal(termination.signalName() ?? "SIGTERM");
  });
  try {
    return await starting;
  } finally {
    done = true;
  }
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
 * Closes within a little more than `graceMs`; whatever still hangs then ends with the process.
 * @throws what closing throws in time.
 */
export async function closeWithin(graceMs: number, closing: Promise<void>, output: Output): Promise<void> {
  const limitMs = graceMs + CLOSING_MS;
  if (!(await within(limitMs, closing))) output.notice(`not closed after ${limitMs} ms; ending anyway`);
}

/**
 * Serves until the signal or a failure, then drains. After a signal, streams get `graceMs`; after a failure (the GPU is
 * lost) they have nothing to wait for, and the process must end soon so that it can be started anew.
 * @throws the failure, after draining, even where draining fails too.
 */
export async function serveUntil(
  signal: AbortSignal,
  server: Stoppable,
  graceMs: number,
  output: Output,
): Promise<void> {
  const failure = await Promise.race([aborted(signal), server.failed ?? new Promise<never>(() => {})]);
  if (!(failure instanceof Error)) return closeWithin(graceMs, server.drain(graceMs), output);
  try {
    await closeWithin(0, server.drain(0), output);
  } catch (error) {
    output.notice(`while closing: ${String(error)}`);
  }
  throw failure;
}
