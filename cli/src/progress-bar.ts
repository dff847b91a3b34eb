/** How far a download or a load is: a bar on a terminal, a line each quarter elsewhere. */
import { Presets, SingleBar } from "cli-progress";

export interface Progress {
  /** @param done how much of the total, not how much more. */
  update(done: number): void;
  stop(): void;
}

const MEBIBYTE = 1024 * 1024;
const LINE_EACH_PERCENT = 25;

interface Unit {
  /** How a number of them is written. */
  readonly format: (count: number) => string;
  readonly name: string;
}

function terminalBar(title: string, total: number, unit: Unit): Progress {
  const format = `${title} {bar} {percentage}% {done}/{size}${unit.name}, {eta_formatted} left`;
  const bar = new SingleBar({ format, hideCursor: true, stream: process.stderr }, Presets.shades_classic);
  const size = unit.format(total);
  bar.start(total, 0, { done: unit.format(0), size });
  return {
    update: (done) => bar.update(done, { done: unit.format(done), size }),
    stop: () => bar.stop(),
  };
}

function lines(title: string, total: number, unit: Unit): Progress {
  let told = 0;
  return {
    update(done) {
      const percent = Math.floor(((done / total) * 100) / LINE_EACH_PERCENT) * LINE_EACH_PERCENT;
      if (percent <= told) return;
      told = percent;
      process.stderr.write(`${title}: ${percent} % of ${unit.format(total)}${unit.name}\n`);
    },
    stop() {},
  };
}

function progress(title: string, total: number, unit: Unit): Progress {
  return process.stderr.isTTY ? terminalBar(title, total, unit) : lines(title, total, unit);
}

/** Progress of `total` bytes on standard error. */
export function byteProgress(title: string, total: number): Progress {
  return progress(title, total, { format: (bytes) => (bytes / MEBIBYTE).toFixed(1), name: " MiB" });
}

/** Progress of `total` things that the title names. */
export function countProgress(title: string, total: number): Progress {
  return progress(title, total, { format: String, name: "" });
}
