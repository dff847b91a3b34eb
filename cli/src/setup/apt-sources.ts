/** Reads apt's own list of archives, in both of its formats (sources.list(5)), to find the mirror that this machine uses. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

export interface AptSource {
  readonly uri: string;
  readonly suites: readonly string[];
  readonly components: readonly string[];
  /** Key file or fingerprint that the archive is signed by; undefined: apt's trusted keys. */
  readonly signedBy: string | undefined;
}

const DEFAULT_SECTION = "main";

/** `deb [options] uri suite component…`, one a line. */
export function parseOneLineSources(text: string): AptSource[] {
  const sources: AptSource[] = [];
  for (const raw of text.split("\n")) {
    const match = /^deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)$/.exec(raw.replace(/#.*$/, "").trim());
    if (match === null) continue;
    const [, options = "", uri = "", suite = "", components = ""] = match;
    const signedBy = /(?:^|\s)signed-by=(\S+)/i.exec(options)?.[1];
    sources.push({ uri, suites: [suite], components: components.split(/\s+/).filter(Boolean), signedBy });
  }
  return sources;
}

/** Stanzas of `Field: value` with continuation lines, parted by empty lines. */
export function parseDeb822Sources(text: string): AptSource[] {
  const sources: AptSource[] = [];
  for (const stanza of text.split(/\n\s*\n/)) {
    const fields = new Map<string, string>();
    let last = "";
    for (const line of stanza.split("\n")) {
      if (line.startsWith("#") || line.trim() === "") continue;
      const field = /^([A-Za-z-]+):\s*(.*)$/.exec(line);
      if (field?.[1] !== undefined) {
        last = field[1].toLowerCase();
        fields.set(last, field[2] ?? "");
      } else fields.set(last, `${fields.get(last) ?? ""}\n${line}`);
    }
    const words = (name: string) => (fields.get(name) ?? "").split(/\s+/).filter(Boolean);
    if (!words("types").includes("deb") || fields.get("enabled")?.toLowerCase() === "no") continue;
    const signedBy = fields.get("signed-by")?.trimEnd();
    for (const uri of words("uris"))
      sources.push({ uri, suites: words("suites"), components: words("components"), signedBy });
  }
  return sources;
}

/** Every archive that apt is set up with. @param folder apt's configuration folder. */
export function aptSources(folder = "/etc/apt"): AptSource[] {
  const sources: AptSource[] = [];
  const list = join(folder, "sources.list");
  if (existsSync(list)) sources.push(...parseOneLineSources(readFileSync(list, "utf8")));
  const parts = join(folder, "sources.list.d");
  for (const name of existsSync(parts) ? readdirSync(parts).sort() : []) {
    const read = () => readFileSync(join(parts, name), "utf8");
    if (name.endsWith(".list")) sources.push(...parseOneLineSources(read()));
    else if (name.endsWith(".sources")) sources.push(...parseDeb822Sources(read()));
  }
  return sources;
}

/** The archive that the release itself comes from. */
export function mirrorOf(sources: readonly AptSource[], codename: string): AptSource | undefined {
  return sources.find(
    (source) =>
      source.suites.includes(codename) &&
      source.components.includes(DEFAULT_SECTION) &&
      !source.uri.startsWith("cdrom:"),
  );
}

/** Whether apt knows the suite already. */
export function hasSuite(sources: readonly AptSource[], suite: string): boolean {
  return sources.some((source) => source.suites.includes(suite) && source.components.includes(DEFAULT_SECTION));
}

/** A deb822 stanza for another suite of the same archive, trusted by the same key. */
export function suiteStanza(mirror: AptSource, suite: string): string {
  const lines = ["Types: deb", `URIs: ${mirror.uri}`, `Suites: ${suite}`, `Components: ${DEFAULT_SECTION}`];
  if (mirror.signedBy !== undefined) lines.push(`Signed-By: ${mirror.signedBy}`);
  return `${lines.join("\n")}\n`;
}
