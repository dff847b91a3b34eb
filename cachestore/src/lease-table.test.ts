import { describe, expect, it } from "vitest";
import { defaultLeaseMs, LeaseTable, maxLeaseMs, maxLeases } from "./lease-table.ts";

describe("LeaseTable", () => {
  it("counts overlapping leases", () => {
    const leases = new LeaseTable(() => 0);
    const first = leases.grant(["a", "b"], 1000);
    const second = leases.grant(["b", "c"], 1000);
    leases.release(first.leaseId);
    leases.release(first.leaseId);
    leases.release("unknown");
    expect(["a", "b", "c"].map((id) => leases.isLeased(id))).toEqual([false, true, true]);
    leases.release(second.leaseId);
    expect([leases.isLeased("b"), leases.size]).toEqual([false, 0]);
    expect(leases.checkIntegrity()).toEqual([]);
  });

  it("ends every lease by itself, at the latest at the limit", () => {
    let now = 0;
    const leases = new LeaseTable(() => now);
    expect(leases.grant(["a"], 0).leaseMs).toBe(defaultLeaseMs);
    expect(leases.grant(["b"], 2 ** 31).leaseMs).toBe(maxLeaseMs);
    now = defaultLeaseMs;
    expect(leases.size).toBe(1);
    expect([leases.isLeased("a"), leases.isLeased("b")]).toEqual([false, true]);
    now = maxLeaseMs;
    expect(leases.size).toBe(0);
    expect(leases.isLeased("b")).toBe(false);
  });

  it("bounds how many run", () => {
    let now = 0;
    const leases = new LeaseTable(() => now);
    for (let index = 0; index < maxLeases; index++) {
      leases.grant(["a"], 100);
    }
    expect(() => leases.grant(["a"], 100)).toThrow(/leases run already/);
    now = 100;
    expect(leases.grant(["a"], 100).leaseId).not.toBe("");
  });
});
