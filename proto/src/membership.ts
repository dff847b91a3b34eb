/** A process that offers itself to the cluster. */
export interface Member {
  id: string;
  role: MemberRole;
  /** `host:port` of its gRPC listener. */
  address: string;
  /** SHA-256 of the weights a worker serves, hex. */
  modelDigestHex?: string;
}

export type MemberRole = "worker" | "cachestore";

/** Default time after which a silent member counts as gone, in milliseconds. */
export const memberTtlMs = 3_000;

export interface Announcement {
  /** Leaves at once. */
  withdraw(): Promise<void>;
}

/** Who is alive. A member that stops announcing leaves every list within its ttl. */
export interface Membership {
  announce(member: Member, ttlMs?: number): Promise<Announcement>;
  list(role: MemberRole): Promise<Member[]>;
  /** Calls back at once and after every change, sorted by id. While the registry cannot be reached the last list stands. */
  watch(role: MemberRole, callback: (members: Member[]) => void): () => void;
  close(): Promise<void>;
}
