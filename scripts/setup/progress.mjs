/** One line for each step of the set-up, so that its user sees what runs and how long it took. */

const QUIET_BELOW_MS = 500;

/** An expected failure of the set-up: its message says what to do. */
export class SetupError extends Error {
  name = "SetupError";
}

/**
 * Runs one step; tells of it only where it takes long enough to be noticed.
 * @template T
 * @param {string} title
 * @param {() => Promise<T>} work
 * @returns {Promise<T>}
 */
export async function step(title, work) {
  const started = Date.now();
  const notice = setTimeout(() => process.stderr.write(`kivimesh: ${title} ...\n`), QUIET_BELOW_MS);
  try {
    const result = await work();
    const took = Date.now() - started;
    if (took >= QUIET_BELOW_MS) process.stderr.write(`kivimesh: ${title}: done in ${(took / 1000).toFixed(1)} s\n`);
    return result;
  } finally {
    clearTimeout(notice);
  }
}

/**
 * Ends the process with one line for an expected failure, and with the stack for a bug.
 * @param {unknown} error
 */
export function fail(error) {
  const expected = error instanceof Error && ["SetupError", "ClusterError"].includes(error.name);
  const text = expected ? error.message : error instanceof Error ? (error.stack ?? error.message) : String(error);
  process.stderr.write(`kivimesh: ${text}\n`);
  process.exit(1);
}
