import { ClusterError } from "@kivimesh/proto";

/** A step that takes longer hangs, in milliseconds. */
export const stepTimeoutMs = 120_000;

/** The step's result. @throws ClusterError DEVICE_LOST where there is none in time: the GPU is given up. */
export async function within<T>(step: Promise<T>, timeoutMs: number): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<never>((_, reject) => {
    const lost = new ClusterError("DEVICE_LOST", `a step did not end within ${timeoutMs} ms`);
    timer = setTimeout(reject, timeoutMs, lost);
  });
  try {
    return await Promise.race([step, timeout]);
  } finally {
    clearTimeout(timer);
  }
}
