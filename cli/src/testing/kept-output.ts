/** An output that keeps what a command says, for its test. */
import type { Output } from "../output.ts";

export interface KeptOutput extends Output {
  /** What went to standard output, JSON included. */
  out: string;
  /** What went to standard error. */
  notices: string;
}

export function keptOutput(): KeptOutput {
  const kept: KeptOutput = {
    out: "",
    notices: "",
    write(text) {
      kept.out += text;
    },
    line(text = "") {
      kept.out += `${text}\n`;
    },
    json(value) {
      kept.out += JSON.stringify(value);
    },
    notice(text) {
      kept.notices += `${text}\n`;
    },
  };
  return kept;
}
