import type { Announcement, Member, MemberRole, Membership } from "./membership.ts";

/** Membership inside one process: who announced and did not withdraw. Members end with the process, so nothing expires. */
export function localMembership(): Membership {
  const members = new Map<string, Member>();
  const watchers = new Set<{ role: MemberRole; callback: (members: Member[]) => void }>();
  const list = (role: MemberRole): Member[] =>
    [...members.values()].filter((member) => member.role === role).sort((a, b) => (a.id < b.id ? -1 : 1));
  const changed = (role: MemberRole) => {
    for (const watcher of watchers) {
      if (watcher.role === role) {
        watcher.callback(list(role));
      }
    }
  };
  return {
    async announce(member): Promise<Announcement> {
      const key = `${member.role}:${member.id}`;
      const entry = { ...member };
      members.set(key, entry);
      changed(member.role);
      return {
        async withdraw() {
          // A later announcement under the same id stays.
          if (members.get(key) === entry) {
            members.delete(key);
            changed(member.role);
          }
        },
      };
    },
    async list(role) {
      return list(role);
    },
    watch(role, callback) {
      const watcher = { role, callback };
      watchers.add(watcher);
      callback(list(role));
      return () => watchers.delete(watcher);
    },
    async close() {
      members.clear();
      watchers.clear();
    },
  };
}
