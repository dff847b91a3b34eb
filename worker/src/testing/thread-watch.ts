import type { Worker } from "node:worker_threads";

/** The thread that `start` makes, and what `start` gives; `onThread` sees the thread once its maker listens to it. */
export async function watchThread<T>(
  start: () => Promise<T>,
  onThread: (thread: Worker) => void = () => undefined,
): Promise<{ thread: Worker; value: T }> {
  const threads: Worker[] = [];
  const note = (thread: Worker) => {
    threads.push(thread);
    onThread(thread);
  };
  process.on("worker", note);
  try {
    const value = await start();
    const [thread] = threads;
    if (thread === undefined || threads.length > 1) throw new RangeError(`${threads.length} threads were started`);
    return { thread, value };
  } finally {
    process.off("worker", note);
  }
}
