/**
 * Adds the platform builds that a registry mirror did not offer to package-lock.json, so that `npm ci` accepts the file
 * on every platform. Run after `npm install` where a mirror lacks builds for other systems: node scripts/complete-lockfile.mjs
 *
 * npm leaves an optional dependency out of the lock file when its registry answers 404, and `npm ci` then refuses the
 * file. Names such as `@biomejs/cli-darwin-arm64` tell the platform; versions come from the parent's exact pin.
 */
import { readFileSync, writeFileSync } from "node:fs";

const FILE = new URL("../package-lock.json", import.meta.url);
const SYSTEMS = ["aix", "android", "darwin", "freebsd", "linux", "netbsd", "openbsd", "openharmony", "sunos", "win32"];
const PROCESSORS = ["arm", "arm64", "ia32", "loong64", "mips64el", "ppc64", "riscv64", "s390x", "wasm32", "x64"];
const ALIASES = { armv7: "arm", windows: "win32", ppc64le: "ppc64" };

const lock = JSON.parse(readFileSync(FILE, "utf8"));
const words = (name) => name.split(/[^a-z0-9]+/).map((word) => ALIASES[word] ?? word);
let added = 0;
for (const entry of Object.values(lock.packages)) {
  for (const [name, version] of Object.entries(entry.optionalDependencies ?? {})) {
    const path = `node_modules/${name}`;
    if (lock.packages[path] !== undefined || !/^\d/.test(version)) continue;
    const parts = words(name);
    const os = SYSTEMS.filter((system) => parts.includes(system));
    const cpu = PROCESSORS.filter((processor) => parts.includes(processor));
    if (os.length === 0 && cpu.length === 0) continue;
    const libc = os.includes("linux")
      ? parts.includes("musl") || parts.includes("musleabihf")
        ? ["musl"]
        : undefined
      : undefined;
    lock.packages[path] = {
      version,
      ...(cpu.length > 0 ? { cpu } : {}),
      ...(libc ? { libc } : {}),
      optional: true,
      ...(os.length > 0 ? { os } : {}),
    };
    if (entry.dev) lock.packages[path].dev = true;
    added += 1;
  }
}
lock.packages = Object.fromEntries(Object.entries(lock.packages).sort(([a], [b]) => (a < b ? -1 : 1)));
writeFileSync(FILE, `${JSON.stringify(lock, null, 2)}\n`);
process.stdout.write(`${added} platform builds added to package-lock.json\n`);
