/** What every command gets, and how it tells the process's exit code. */
import type { Output } from "../output.ts";

export interface CommandContext {
  readonly output: Output;
  /** Exit code where it is neither success nor an error. */
  exitWith(code: number): void;
}

/** Exit codes of the command. */
export const EXIT = { ok: 0, failure: 1, usage: 2, interrupted: 130 } as const;
