/** Rows of the bench's result: figures of one case, its share of a roof, its ratio to a peer, its floor. */
import type { CaseTime } from "./case-timing.ts";
import type { DeviceRoofs } from "./device-roofs.ts";
import type { KernelCase } from "./kernel-case.ts";

/** One row of the JSON file. Times in milliseconds of one run. */
export interface BenchResult {
  readonly kernel: string;
  readonly shape: string;
  readonly kvFormat?: string;
  readonly numerics: "invariant" | "fast";
  readonly variant: string;
  readonly ms?: number;
  /** Least and most of the samples. */
  readonly spread?: readonly [number, number];
  readonly gbPerSecond?: number;
  readonly tflops?: number;
  readonly roof: KernelCase["roof"];
  /** Of the roof that the same run measured: 1 is the device's limit. */
  readonly roofShare?: number;
  /** Against f64. */
  readonly relativeError?: number;
  /** The largest relative error that is right. */
  readonly tolerance?: number;
  /** Key of the peer. */
  readonly peer?: string;
  readonly peerMs?: number;
  /** peerMs / ms: above 1 is faster than the peer. */
  readonly ratio?: number;
  readonly floor?: string;
  /** Absent where the floor compares with something that this row does not have. */
  readonly floorMet?: boolean;
  /** Why the case did not run here. */
  readonly skipped?: string;
  /** What failed. */
  readonly error?: string;
}

/** Milliseconds by peer key. */
export type PeerTimes = ReadonlyMap<string, number>;

function rounded(value: number, digits = 4): number {
  return Number(value.toPrecision(digits));
}

/** What the case is called in every row, run or not. */
export function caseName({ kernel, shape, kvFormat, numerics, variant, roof, peer, floor }: KernelCase): BenchResult {
  return {
    kernel,
    shape,
    ...(kvFormat === undefined ? {} : { kvFormat }),
    numerics,
    variant,
    roof,
    ...(peer === undefined ? {} : { peer }),
    ...(floor === undefined ? {} : { floor }),
  };
}

/** The row of a case that ran. */
export function measuredResult(
  each: KernelCase,
  time: CaseTime,
  check: { readonly relativeError: number; readonly tolerance: number },
  roofs: DeviceRoofs,
): BenchResult {
  const gbPerSecond = each.bytes / time.median / 1e6;
  const tflops = each.flops / time.median / 1e9;
  const reached = each.roof === "bytes" ? gbPerSecond : tflops;
  const limit = { bytes: roofs.readGb, matrix: roofs.matrixTflops, "multiply-adds": roofs.multiplyAddTflops }[
    each.roof
  ];
  return {
    ...caseName(each),
    ms: rounded(time.median),
    spread: [rounded(time.least), rounded(time.most)],
    ...(each.roof === "bytes" ? { gbPerSecond: rounded(gbPerSecond) } : { tflops: rounded(tflops) }),
    ...(limit === undefined ? {} : { roofShare: rounded(reached / limit, 3) }),
    relativeError: rounded(check.relativeError, 2),
    tolerance: check.tolerance,
  };
}

/** Whether the row says that a kernel is wrong: it failed, or its error is above what is right (NaN too). */
export function isFailure({ error, relativeError, tolerance }: BenchResult): boolean {
  if (error !== undefined) return true;
  if (tolerance === undefined) return false;
  return !(typeof relativeError === "number" && relativeError <= tolerance);
}

/** Adds the peer's time, the ratio and whether the floor is met. */
export function withPeer(result: BenchResult, peers: PeerTimes): BenchResult {
  const peerMs = result.peer === undefined ? undefined : peers.get(result.peer);
  const { ms } = result;
  const joined: BenchResult =
    peerMs === undefined || ms === undefined
      ? result
      : { ...result, peerMs: rounded(peerMs), ratio: rounded(peerMs / ms, 3) };
  const floorMet = meetsFloor(joined);
  return floorMet === undefined ? joined : { ...joined, floorMet };
}

const UNITS: Readonly<Record<string, (result: BenchResult) => number | undefined>> = {
  "× peer": ({ ratio }) => ratio,
  "TFLOP/s": ({ tflops }) => tflops,
  "TB/s": ({ gbPerSecond }) => (gbPerSecond === undefined ? undefined : gbPerSecond / 1000),
  "GB/s": ({ gbPerSecond }) => gbPerSecond,
  ms: ({ ms }) => ms,
  µs: ({ ms }) => (ms === undefined ? undefined : ms * 1000),
};

/**
 * Reads "≥ 3.9 × peer", "≥ 230 TFLOP/s", "≥ 2.2 TB/s", "≤ 0.06 ms", "≤ 60 µs".
 * @returns undefined for other words and where the row lacks that figure.
 */
export function meetsFloor(result: BenchResult): boolean | undefined {
  const match = /^([≥≤])\s*([\d.]+)\s*(× peer|TFLOP\/s|TB\/s|GB\/s|ms|µs)$/.exec(result.floor ?? "");
  const figure = UNITS[match?.[3] ?? ""]?.(result);
  if (match === null || figure === undefined) return undefined;
  return match[1] === "≥" ? figure >= Number(match[2]) : figure <= Number(match[2]);
}

interface PeerEntry {
  readonly key?: string;
  readonly ms?: number;
}

/** Reads the file that `peers.py` wrote, or the lines that it printed. @throws SyntaxError for text that is neither. */
export function parsePeers(text: string): PeerTimes {
  const lines = text.split("\n").filter((line) => line.startsWith("{") && line.trimEnd().endsWith("}"));
  const entries: PeerEntry[] =
    lines.length > 0
      ? lines.map((line) => JSON.parse(line) as PeerEntry)
      : Object.values((JSON.parse(text) as { readonly peers?: Readonly<Record<string, PeerEntry>> }).peers ?? {});
  return new Map(entries.flatMap(({ key, ms }) => (key === undefined || ms === undefined ? [] : [[key, ms] as const])));
}
