/**
 * The kernel bench: measures the device's roofs, then checks and times every case. `node scripts/bench-kernels.mjs` builds
 * it as one file and runs it; the file alone, Node and the `webgpu` package are enough on a machine with a GPU.
 *
 * Prints a JSON line for what the run is (`origin`) and for each row (`result`), then the table. The exit code is 1 where a
 * row failed. Where several benches share the GPU, `--lock FOLDER` names a folder that one of them makes while it measures.
 * `--report LINES` makes table and files from lines that a former run printed.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { openGpu } from "../src/index.ts";
import { type BenchOrigin, benchTable } from "./bench-report.ts";
import { type BenchResult, isFailure, type PeerTimes, parsePeers, withPeer } from "./bench-result.ts";
import { runCases } from "./case-run.ts";
import { HARDWARE_TIMING, SOFTWARE_TIMING } from "./case-timing.ts";
import { CASE_LISTS } from "./cases/case-lists.ts";
import { measureRoofs } from "./device-roofs.ts";
import { folderLock } from "./folder-lock.ts";
import type { CaseSize, KernelCase } from "./kernel-case.ts";

/** Put in by the bundler. */
declare const BENCH_COMMIT: string | undefined;

const { values: flags } = parseArgs({
  options: {
    filter: { type: "string", multiple: true, default: [] },
    size: { type: "string" },
    profile: { type: "string" },
    seconds: { type: "string", default: "3600" },
    peers: { type: "string" },
    "peers-name": { type: "string" },
    report: { type: "string" },
    out: { type: "string" },
    lock: { type: "string" },
  },
});

function oneOf<T extends string>(flag: string, value: string, allowed: readonly T[]): T {
  const found = allowed.find((each) => each === value);
  if (found === undefined) throw new RangeError(`--${flag} ${value}: it must be ${allowed.join(" or ")}`);
  return found;
}

/** Every word of one of the filters is in the case's name. */
function isWanted({ kernel, shape, kvFormat = "", variant, numerics }: KernelCase): boolean {
  const name = [kernel, shape, kvFormat, variant, numerics].join(" ").toLowerCase();
  if (flags.filter.length === 0) return true;
  return flags.filter.some((filter) =>
    filter
      .toLowerCase()
      .split(" ")
      .every((word) => name.includes(word)),
  );
}

function print(line: object): void {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

/** Opens the GPU and runs what was asked for. */
async function measure(seconds: number): Promise<{ origin: BenchOrigin; results: BenchResult[] }> {
  const profile = flags.profile === undefined ? undefined : oneOf("profile", flags.profile, ["software", "hardware"]);
  const gpu = await openGpu(profile === undefined ? {} : { profile });
  const deadline = performance.now() + seconds * 1000;
  const defaultSize: CaseSize = gpu.profile === "software" ? "tiny" : "full";
  const size = oneOf("size", flags.size ?? defaultSize, ["full", "tiny"]);
  const cases = CASE_LISTS.flatMap((list) => list(size)).filter(isWanted);
  if (cases.length === 0 && flags.filter.length > 0)
    throw new RangeError(`no case matches --filter ${flags.filter.join(", ")}`);
  const timing = gpu.profile === "software" ? SOFTWARE_TIMING : HARDWARE_TIMING;
  const exclusively = folderLock(flags.lock);
  const roofs = await exclusively(() => measureRoofs(gpu, timing));
  const commit = typeof BENCH_COMMIT === "string" ? BENCH_COMMIT : "unknown";
  const origin: BenchOrigin = { device: gpu.name, date: new Date().toISOString(), commit, roofs, timing };
  print({ origin });
  const onResult = (result: BenchResult) => print({ result });
  return { origin, results: await runCases(cases, { gpu, roofs, timing, deadline, onResult, exclusively }) };
}

/** Reads the lines of a former run. */
function recorded(file: string): { origin: BenchOrigin; results: BenchResult[] } {
  const lines = readFileSync(file, "utf8").split("\n");
  const parsed = lines
    .filter((line) => line.startsWith('{"origin"') || line.startsWith('{"result"'))
    .map((line) => JSON.parse(line) as { readonly origin?: BenchOrigin; readonly result?: BenchResult });
  const origin = parsed.find((line) => line.origin !== undefined)?.origin;
  if (origin === undefined) throw new RangeError(`${file}: no line of a kernel bench tells its origin`);
  return { origin, results: parsed.flatMap(({ result }) => result ?? []) };
}

const seconds = Number(flags.seconds);
if (!(seconds > 0)) throw new RangeError(`--seconds ${flags.seconds}: it must be a positive number`);
const peers: PeerTimes = flags.peers === undefined ? new Map() : parsePeers(readFileSync(flags.peers, "utf8"));
const { origin, results } = flags.report === undefined ? await measure(seconds) : recorded(flags.report);
const joined = results.map((result) => withPeer(result, peers));
const peersName = flags["peers-name"];
const table = benchTable(joined, peersName === undefined ? origin : { ...origin, peers: peersName });
process.stdout.write(`\n${table}`);
if (flags.out !== undefined) {
  writeFileSync(`${flags.out}.json`, `[\n${joined.map((result) => JSON.stringify(result)).join(",\n")}\n]\n`);
  writeFileSync(`${flags.out}.md`, table);
}
const failures = joined.filter(isFailure);
process.stdout.write(`${joined.length} cases, ${failures.length} failed\n`);
// Dawn's instance lives as long as the process; nothing is left to wait for.
process.exit(failures.length > 0 ? 1 : 0);
