/** One line for each step of the set-up that takes long enough to be noticed. */
const QUIET_BELOW_MS = 500;

/** Where the set-up tells what it does; standard error, so that standard output stays the answer's. */
export type Notify = (line: string) => void;

export const notifyTerminal: Notify = (line) => {
  process.stderr.write(`kivimesh: ${line}\n`);
};

/** Runs `work`, with a line when it starts to last and one with its duration at the end. */
export async function step<T>(title: string, work: () => Promise<T>, notify: Notify = notifyTerminal): Promise<T> {
  const started = Date.now();
  const notice = setTimeout(() => notify(`${title} ...`), QUIET_BELOW_MS);
  try {
    const result = await work();
    const tookMs = Date.now() - started;
    if (tookMs >= QUIET_BELOW_MS) notify(`${title}: done in ${(tookMs / 1000).toFixed(1)} s`);
    return result;
  } finally {
    clearTimeout(notice);
  }
}
