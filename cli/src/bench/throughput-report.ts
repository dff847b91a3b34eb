/** Rows, table and plots of `kivimesh bench throughput`. */
import type { MemoryPlan } from "@kivimesh/worker";
import { formatBytes, formatTable } from "../output.ts";
import type { Chart } from "./svg-chart.ts";
import type { ThroughputResult } from "./throughput.ts";

/** One row of the JSON file: a workload on one engine. */
export interface ThroughputRow extends ThroughputResult {
  readonly device: string;
  readonly model: string;
  readonly kvFormat: string;
  readonly numerics: "invariant" | "fast";
  /** Budget of GPU memory for everything; absent where none was set. */
  readonly memoryBytes?: number;
  /** What keeps the budget from more sequences. */
  readonly limitedBy?: MemoryPlan["limitedBy"];
  /** Time to load the model and compile its kernels. */
  readonly openSeconds: number;
}

/** A workload that did not run, and why. */
export interface FailedRow extends Pick<ThroughputRow, "model" | "kvFormat" | "numerics" | "workload" | "memoryBytes"> {
  readonly error: string;
}

export function throughputTable(rows: readonly (ThroughputRow | FailedRow)[]): string {
  return formatTable(
    [
      "model",
      "workload",
      "KV format",
      "numerics",
      "output tokens/s",
      "batch",
      "KV tokens",
      "ITL p50 / p99",
      "GPU memory",
    ],
    rows.map((row) => {
      const name = [row.model, row.workload, row.kvFormat, row.numerics];
      if ("error" in row) return [...name, `failed: ${row.error}`, "", "", "", ""];
      const { interTokenMs, peakGpuBytes } = row;
      return [
        ...name,
        `${row.outputTokensPerSecond.toFixed(1)}${row.measured === "steady" ? " (steady)" : ""}`,
        String(row.largestBatch),
        String(row.kvCapacityTokens),
        interTokenMs === undefined ? "" : `${interTokenMs.p50.toFixed(1)} / ${interTokenMs.p99.toFixed(1)} ms`,
        formatBytes(peakGpuBytes.total),
      ];
    }),
  );
}

/** Speed, capacity and memory, side by side for each KV format. */
export function throughputCharts(all: readonly (ThroughputRow | FailedRow)[]): readonly (readonly [string, Chart])[] {
  const rows = all.filter((row): row is ThroughputRow => !("error" in row));
  if (rows.length === 0) return [];
  const names = (of: (row: ThroughputRow) => string) => [...new Set(rows.map(of))];
  const workloads = names(({ model, workload }) => `${model} ${workload}`);
  const engines = names(({ kvFormat, numerics }) => `${kvFormat}, ${numerics}`);
  const compared = (title: string, unit: string, of: (row: ThroughputRow) => number): Chart => ({
    title,
    unit,
    kind: "bars",
    categories: workloads,
    series: engines.map((name) => ({
      name,
      values: workloads.map((workload) => {
        const row = rows.find(
          (r) => `${r.model} ${r.workload}` === workload && `${r.kvFormat}, ${r.numerics}` === name,
        );
        return row === undefined ? undefined : of(row);
      }),
    })),
  });
  const parts = ["weights", "kvPages", "kvResidual", "activations", "other"] as const;
  const memory: Chart = {
    title: "GPU memory",
    unit: "bytes",
    kind: "stacked",
    categories: rows.map(({ kvFormat, workload }) => `${kvFormat} ${workload}`),
    series: parts.map((part) => ({ name: part, values: rows.map(({ peakGpuBytes }) => peakGpuBytes[part]) })),
  };
  return [
    [
      "throughput",
      compared("Output tokens a second, prefill included", "tokens/s", (row) => row.outputTokensPerSecond),
    ],
    ["batch", compared("Largest batch", "sequences", (row) => row.largestBatch)],
    ["capacity", compared("KV capacity", "tokens", (row) => row.kvCapacityTokens)],
    ["memory", memory],
  ];
}
