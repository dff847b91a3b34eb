import { localMembership } from "@kivimesh/proto";
import { expect, test } from "vitest";
import { requireFreeId } from "./worker-identity.ts";

test("an id that a live worker has is refused; one that is given up is free", async () => {
  const membership = localMembership();
  await requireFreeId(membership, "a", 0);
  const announcement = await membership.announce({ id: "a", role: "worker", address: "127.0.0.1:1" });
  await membership.announce({ id: "b", role: "cachestore", address: "127.0.0.1:2" });
  await requireFreeId(membership, "b", 0);
  await expect(requireFreeId(membership, "a", 300)).rejects.toThrow("a live worker at 127.0.0.1:1 has the id a");
  const waiting = requireFreeId(membership, "a", 10_000);
  await announcement.withdraw();
  await waiting;
  await membership.close();
});
