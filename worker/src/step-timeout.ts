import type { DeviceProfile } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";

/**
 * A step that takes longer hangs, in milliseconds. On a GPU a step takes well under a second, minutes only if it hangs.
 * A software driver computes 128 prefill rows of a 7B model in more than two minutes on two cores, and large
 * configurations ask for more rows: there the limit only tells a driver that never answers from a slow one.
 */
export const stepTimeoutMs: Readonly<Record<DeviceProfile, number>> = { hardware: 60_000, software: 1_800_000 };

/** The step's result. @throws ClusterError DEVICE_LOST where there is none in time: the GPU is given up. */
export async function within<T>(step: Promise<T>, timeoutMs: number): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const timeout = new Promise<never>((_, reject) => {
    const expire = () => reject(new ClusterError("DEVICE_LOST", `a step did not end within ${timeoutMs} ms`));
    timer = setTimeout(expire, timeoutMs);
  });
  try {
    return await Promise.race([step, timeout]);
  } finally {
    clearTimeout(timer);
  }
}
