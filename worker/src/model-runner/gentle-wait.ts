/**
 * Dawn's node binding polls in a setImmediate loop while anything is pending, which keeps one core busy. A software
 * driver needs that core: with this brake each turn of the event loop lasts at least a millisecond while waiting.
 */
const BRAKE_MILLISECONDS = 1;

const never = new Int32Array(new SharedArrayBuffer(4));

/** Waits for GPU work. @param brake only where a step lasts many milliseconds and the thread has little else to do. */
export async function gentleWait<T>(work: Promise<T>, brake: boolean): Promise<T> {
  if (!brake) return work;
  let pending = true;
  const slow = () => {
    if (!pending) return;
    Atomics.wait(never, 0, 0, BRAKE_MILLISECONDS);
    setImmediate(slow);
  };
  setImmediate(slow);
  try {
    return await work;
  } finally {
    pending = false;
  }
}
