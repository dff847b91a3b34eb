/** The bench's files: the rows as JSON, and a table of them in Markdown. */
import { type BenchResult, isFailure } from "./bench-result.ts";
import type { TimingPlan } from "./case-timing.ts";
import type { DeviceRoofs } from "./device-roofs.ts";

/** Where and when the rows were measured. */
export interface BenchOrigin {
  readonly device: string;
  /** ISO date. */
  readonly date: string;
  readonly commit: string;
  readonly roofs: DeviceRoofs;
  readonly timing: TimingPlan;
  /** The peers' software, such as "torch 2.11.0, CUDA 13.0". */
  readonly peers?: string;
}

function microseconds(ms: number): string {
  return ms >= 1 ? `${ms.toFixed(2)} ms` : `${(ms * 1000).toPrecision(3)} µs`;
}

function bandwidth(gbPerSecond: number): string {
  return gbPerSecond >= 1000 ? `${(gbPerSecond / 1000).toFixed(2)} TB/s` : `${gbPerSecond.toPrecision(3)} GB/s`;
}

function operations(tflops: number): string {
  return tflops >= 0.1 ? `${tflops.toPrecision(3)} TFLOP/s` : `${(tflops * 1000).toPrecision(3)} GFLOP/s`;
}

function speed({ gbPerSecond, tflops }: BenchResult): string {
  if (tflops !== undefined) return operations(tflops);
  return gbPerSecond === undefined ? "" : bandwidth(gbPerSecond);
}

function verdict({ floor, floorMet }: BenchResult): string {
  if (floor === undefined) return "";
  return floorMet === undefined ? floor : `${floor} ${floorMet ? "✓" : "✗ missed"}`;
}

function accuracy(result: BenchResult): string {
  const { relativeError = Number.NaN, tolerance = Number.NaN } = result;
  const error = relativeError.toExponential(1);
  return isFailure(result) ? `**${error}, above ${tolerance.toExponential(1)}**` : error;
}

function row(result: BenchResult): string {
  const { kernel, shape, kvFormat, numerics, variant, ms, spread, roofShare, peerMs, ratio, relativeError } = result;
  const outcome =
    result.error !== undefined ? `**failed**: ${result.error.replaceAll(/[|\n]/g, " ")}` : (result.skipped ?? "");
  const cells = [
    kernel,
    shape,
    kvFormat ?? "",
    numerics,
    variant,
    ms === undefined ? outcome : microseconds(ms),
    spread === undefined ? "" : `${microseconds(spread[0])} – ${microseconds(spread[1])}`,
    speed(result),
    roofShare === undefined ? "" : `${(roofShare * 100).toFixed(0)} % of ${result.roof}`,
    peerMs === undefined ? "" : microseconds(peerMs),
    ratio === undefined ? "" : `${ratio.toPrecision(3)} ×`,
    verdict(result),
    relativeError === undefined ? "" : accuracy(result),
  ];
  return `| ${cells.join(" | ")} |`;
}

const HEADER = `| kernel | shape | KV format | numerics | variant | time | spread | speed | of the roof | peer | faster than the peer | at least | relative error |
|---|---|---|---|---|---|---|---|---|---|---|---|---|`;

function roofLine({ readGb, copyGb, multiplyAddTflops, matrixTflops }: DeviceRoofs): string {
  const matrix = matrixTflops === undefined ? "no subgroup matrices" : `matrix products ${operations(matrixTflops)}`;
  return `read ${bandwidth(readGb)}, copy ${bandwidth(copyGb)}, f32 multiply-adds ${operations(multiplyAddTflops)}, ${matrix}`;
}

/** The whole Markdown page. */
export function benchTable(results: readonly BenchResult[], origin: BenchOrigin): string {
  const { device, date, commit, roofs, timing, peers } = origin;
  return `# Kernel bench

${device}; ${date.slice(0, 10)}; commit ${commit}${peers === undefined ? "" : `; peers: ${peers}`}.
Roofs measured in the same run: ${roofLine(roofs)}.

Medians of ${timing.samples} samples of ${timing.minimumRuns} runs or more (fewer of those that take longer than 12 ms), after ${timing.warmSeconds} s of the same work; every row was compared with a reference in f64 on poisoned outputs first. "Of the roof" counts each byte once (or the products) against the measured roof.

${HEADER}
${results.map(row).join("\n")}
`;
}
