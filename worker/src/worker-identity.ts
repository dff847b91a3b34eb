/** A worker's id names its queue: two live workers under one id would take each other's jobs. */
import { setTimeout } from "node:timers/promises";
import { ClusterError, type Membership, memberTtlMs } from "@kivimesh/proto";

const pollMs = 250;

/**
 * Waits until no live worker is announced as `id`. A worker that was killed stays announced for its time to live, so a
 * restart under the same id waits that long.
 * @throws ClusterError INVALID_ARGUMENT where one is still there after `waitMs`.
 */
export async function requireFreeId(membership: Membership, id: string, waitMs = memberTtlMs + 1_000): Promise<void> {
  const until = performance.now() + waitMs;
  for (;;) {
    const other = (await membership.list("worker")).find((member) => member.id === id);
    if (other === undefined) return;
    if (performance.now() >= until) {
      const reason = `a live worker at ${other.address} has the id ${id}; ids are unique in a cluster`;
      throw new ClusterError("INVALID_ARGUMENT", reason, { parameter: "id" });
    }
    await setTimeout(pollMs);
  }
}
