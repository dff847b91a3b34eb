import { randomUUID } from "node:crypto";
import { ClusterError } from "@kivimesh/proto";

/** Lease length where the caller names none, and the longest it may ask for, in milliseconds. */
export const defaultLeaseMs = 10_000;
export const maxLeaseMs = 60_000;
/** Leases that may run at once. */
export const maxLeases = 16_384;
const retryAfterMs = 1_000;

interface Lease {
  readonly blockIds: readonly string[];
  readonly endsAt: number;
}

/** Which blocks must not be evicted for now. Every lease ends by itself, so a client that is stuck or gone holds nothing. */
export class LeaseTable {
  readonly #now: () => number;
  readonly #leases = new Map<string, Lease>();
  readonly #counts = new Map<string, number>();
  /** No lease ends before this; an early guess only costs a walk. */
  #nextEnd = Number.POSITIVE_INFINITY;

  /** `now` in milliseconds, never going back. */
  constructor(now: () => number) {
    this.#now = now;
  }

  /** Leases blocks; `askedMs` 0 is the default. Throws QUEUE_FULL when too many leases run. */
  grant(blockIds: readonly string[], askedMs: number): { leaseId: string; leaseMs: number } {
    this.expire();
    if (this.#leases.size >= maxLeases) {
      throw new ClusterError("QUEUE_FULL", `${maxLeases} leases run already`, { retryAfterMs });
    }
    const leaseMs = Math.min(askedMs === 0 ? defaultLeaseMs : askedMs, maxLeaseMs);
    const leaseId = randomUUID();
    const endsAt = this.#now() + leaseMs;
    this.#leases.set(leaseId, { blockIds, endsAt });
    this.#nextEnd = Math.min(this.#nextEnd, endsAt);
    for (const id of blockIds) {
      this.#counts.set(id, (this.#counts.get(id) ?? 0) + 1);
    }
    return { leaseId, leaseMs };
  }

  release(leaseId: string): void {
    const lease = this.#leases.get(leaseId);
    if (lease === undefined) {
      return;
    }
    this.#leases.delete(leaseId);
    for (const id of lease.blockIds) {
      const count = (this.#counts.get(id) ?? 0) - 1;
      if (count > 0) {
        this.#counts.set(id, count);
      } else {
        this.#counts.delete(id);
      }
    }
  }

  /** Ends every lease whose time is over. Cheap enough to run before each decision. */
  expire(): void {
    const now = this.#now();
    if (now < this.#nextEnd) {
      return;
    }
    this.#nextEnd = Number.POSITIVE_INFINITY;
    for (const [leaseId, lease] of this.#leases) {
      if (lease.endsAt <= now) {
        this.release(leaseId);
      } else {
        this.#nextEnd = Math.min(this.#nextEnd, lease.endsAt);
      }
    }
  }

  /** Call `expire` first where it matters. */
  isLeased(blockId: string): boolean {
    return this.#counts.has(blockId);
  }

  get size(): number {
    this.expire();
    return this.#leases.size;
  }

  checkIntegrity(): string[] {
    const counts = new Map<string, number>();
    for (const lease of this.#leases.values()) {
      for (const id of lease.blockIds) {
        counts.set(id, (counts.get(id) ?? 0) + 1);
      }
    }
    const same =
      counts.size === this.#counts.size && [...counts].every(([id, count]) => this.#counts.get(id) === count);
    return same ? [] : ["lease counts do not match the leases"];
  }
}
