/** How many rows of logits exist at once. */
import type { DeviceProfile } from "@kivimesh/kernels";
import type { BufferLimits } from "./kv-geometry.ts";

/** Each slab of rows reads the head's weights again: on a GPU that costs more than the memory. */
const MAX_LOGITS_BYTES: Readonly<Record<DeviceProfile, number>> = { software: 64 << 20, hardware: 512 << 20 };

/** Rows of the residual stream that one pass takes through the head, of at most `maxRows`. */
export function logitsRows(
  { maxStorageBufferBindingSize }: Pick<BufferLimits, "maxStorageBufferBindingSize">,
  profile: DeviceProfile,
  vocabulary: number,
  maxRows: number,
): number {
  const limit = Math.min(MAX_LOGITS_BYTES[profile], maxStorageBufferBindingSize);
  return Math.max(1, Math.min(maxRows, Math.floor(limit / (vocabulary * 4))));
}
