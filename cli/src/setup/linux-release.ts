/** Which Linux this is, from /etc/os-release (freedesktop.org's os-release format). */
import { readFileSync } from "node:fs";

export interface LinuxRelease {
  /** Lower-case id, such as "debian" or "ubuntu"; empty where unknown. */
  readonly id: string;
  /** Ids it derives from. */
  readonly like: readonly string[];
  /** Such as "bookworm"; empty where there is none. */
  readonly codename: string;
}

export function parseLinuxRelease(text: string): LinuxRelease {
  const fields = new Map<string, string>();
  for (const line of text.split("\n")) {
    const match = /^([A-Z_]+)=(?:"(.*)"|'(.*)'|(.*))$/.exec(line.trim());
    if (match?.[1] !== undefined) fields.set(match[1], match[2] ?? match[3] ?? match[4] ?? "");
  }
  return {
    id: (fields.get("ID") ?? "").toLowerCase(),
    like: (fields.get("ID_LIKE") ?? "").toLowerCase().split(/\s+/).filter(Boolean),
    codename: fields.get("VERSION_CODENAME") ?? "",
  };
}

/** This machine's release; undefined where there is no os-release file. */
export function linuxRelease(path = "/etc/os-release"): LinuxRelease | undefined {
  try {
    return parseLinuxRelease(readFileSync(path, "utf8"));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** Whether packages come from apt. */
export function usesApt(release: LinuxRelease | undefined): boolean {
  return release !== undefined && [release.id, ...release.like].some((id) => id === "debian" || id === "ubuntu");
}
