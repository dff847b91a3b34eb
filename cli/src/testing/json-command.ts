/** Runs a command line in this process, for tests of what it prints as JSON. */
import { main } from "../main.ts";
import type { Output } from "../output.ts";

/** @returns the one value that the command printed. @throws where it exits otherwise than with 0, with its notices. */
export async function jsonOf(...argv: string[]): Promise<unknown> {
  const values: unknown[] = [];
  const notices: string[] = [];
  const output: Output = {
    write() {},
    line() {},
    json: (value) => values.push(value),
    notice: (text) => notices.push(text),
  };
  const code = await main(argv, output);
  if (code !== 0 || values.length !== 1) throw new Error(`exit code ${code}: ${notices.join("\n")}`);
  return JSON.parse(JSON.stringify(values[0]));
}
