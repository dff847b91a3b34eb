/** How far a download or a load is: a bar on a terminal, a line each ten percent elsewhere. */
import { format } from "node:util";
import { Presets, SingleBar } from "cli-progress";

export interface Progress {
  /** @param done how much of the total, not how much more. */
  update(done: number): void;
  stop(): void;
}

const MEBIBYTE = 1024 * 1024;
const LINE_EACH_PERCENT = 25;

function terminalBar(title: string, totalBytes: number): Progress {
  const bar = new SingleBar(
    {
      format: `${title} {bar} {percentage}% {done}/{size} MiB, {eta_formatted} left`,
      hideCursor: true,
      stream: process.stderr,
    },
    Presets.shades_classic,
  );
  const size = (totalBytes / MEBIBYTE).toFixed(1);
  bar.start(totalBytes, 0, { done: "0", size });
  return {
    update: (done) => bar.update(done, { done: (done / MEBIBYTE).toFixed(1), size }),
    stop: () => bar.stop(),
  };
}

function lines(title: string, totalBytes: number): Progress {
  let told = 0;
  return {
    update(done) {
      const percent = Math.floor(((done / totalBytes) * 100) / LINE_EACH_PERCENT) * LINE_EACH_PERCENT;
      if (percent <= told) return;
      told = percent;
      process.stderr.write(format("%s: %d %% of %s MiB\n", title, percent, (totalBytes / MEBIBYTE).toFixed(1)));
    },
    stop() {},
  };
}

/** Progress of `totalBytes` on standard error. */
export function byteProgress(title: string, totalBytes: number): Progress {
  return process.stderr.isTTY ? terminalBar(title, totalBytes) : lines(title, totalBytes);
}
