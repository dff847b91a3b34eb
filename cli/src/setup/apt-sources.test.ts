import { mkdirSync, mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { manualCommands } from "./apt.ts";
import { aptSources, hasSuite, mirrorOf, parseDeb822Sources, parseOneLineSources, suiteStanza } from "./apt-sources.ts";

const DEB822 = `# a comment
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
`;

describe("apt's sources", () => {
  it("reads stanzas", () => {
    expect(parseDeb822Sources(DEB822)).toEqual([
      {
        uri: "http://mirror.example/debian",
        suites: ["bookworm", "bookworm-updates"],
        components: ["main"],
        signedBy: "/usr/share/keyrings/debian-archive-keyring.gpg",
      },
      {
        uri: "http://mirror.example/debian-security",
        suites: ["bookworm-security"],
        components: ["main"],
        signedBy: undefined,
      },
    ]);
  });

  it("reads a key that is inside the stanza, and skips what is switched off or source code", () => {
    const text = `Enabled: no\nTypes: deb\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n
Types: deb-src\nURIs: http://source.example\nSuites: bookworm\nComponents: main\n
Types: deb deb-src\nURIs: http://a.example http://b.example\nSuites: bookworm\nComponents: main contrib
Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEY\n -----END PGP PUBLIC KEY BLOCK-----\n`;
    const sources = parseDeb822Sources(text);
    expect(sources.map((source) => source.uri)).toEqual(["http://a.example", "http://b.example"]);
    expect(sources[0]?.signedBy).toMatch(/^\n -----BEGIN PGP[\s\S]*END PGP PUBLIC KEY BLOCK-----$/);
    expect(parseDeb822Sources(suiteStanza(sources[0]!, "bookworm-backports"))[0]?.signedBy).toBe(sources[0]?.signedBy);
  });

  it("reads one-line entries with options", () => {
    const text = `# deb http://old.example/debian bookworm main
deb [arch=amd64 signed-by=/etc/keys/a.gpg] https://snapshot.example/archive/debian/20250520T000000Z bookworm main contrib # mirror
deb-src http://mirror.example/debian bookworm main
deb cdrom:[Debian]/ bookworm main`;
    expect(parseOneLineSources(text)).toEqual([
      {
        uri: "https://snapshot.example/archive/debian/20250520T000000Z",
        suites: ["bookworm"],
        components: ["main", "contrib"],
        signedBy: "/etc/keys/a.gpg",
      },
      { uri: "cdrom:[Debian]/", suites: ["bookworm"], components: ["main"], signedBy: undefined },
    ]);
  });

  it("finds the release's mirror among all files and makes the backports stanza of it", () => {
    const folder = mkdtempSync(join(tmpdir(), "kivimesh-apt-"));
    mkdirSync(join(folder, "sources.list.d"));
    writeFileSync(join(folder, "sources.list"), "deb cdrom:[Debian]/ bookworm main\n");
    writeFileSync(join(folder, "sources.list.d/debian.sources"), DEB822);
    writeFileSync(join(folder, "sources.list.d/other.list.save"), "deb http://no.example bookworm main\n");
    const sources = aptSources(folder);
    const mirror = mirrorOf(sources, "bookworm");
    expect(mirror?.uri).toBe("http://mirror.example/debian");
    expect(hasSuite(sources, "bookworm-backports")).toBe(false);
    const stanza = suiteStanza(mirror!, "bookworm-backports");
    expect(stanza).toBe(
      "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
    );
    expect(hasSuite(parseDeb822Sources(stanza), "bookworm-backports")).toBe(true);
    expect(mirrorOf(sources, "trixie")).toBeUndefined();
  });

  it("says the commands that root would run", () => {
    const request = { packages: ["mesa-vulkan-drivers"], purpose: "a Vulkan driver", suite: "bookworm-backports" };
    expect(manualCommands(request, "Types: deb\nURIs: http://m.example\n")).toBe(
      `  printf 'Types: deb\\nURIs: http://m.example\\n' | sudo tee /etc/apt/sources.list.d/kivimesh-backports.sources
  sudo apt-get update
  sudo apt-get install -y --no-install-recommends -t bookworm-backports mesa-vulkan-drivers`,
    );
    expect(manualCommands({ packages: ["redis-server"], purpose: "redis" }, undefined)).not.toContain("printf");
  });
});
