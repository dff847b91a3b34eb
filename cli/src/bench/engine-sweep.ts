/** Batch × context: the points of `kivimesh bench engine`, on one open engine. */
import type { EnginePoint, EnginePointResult } from "./engine-point.ts";
import { measurePoint, sequenceTokens } from "./engine-point.ts";
import type { EngineSession } from "./engine-session.ts";
import type { Chart } from "./svg-chart.ts";

/** A point that did not run, and why. */
export type SkippedPoint = EnginePoint & { readonly skipped: string };

export type SweepRow = EnginePointResult | SkippedPoint;

/** Every batch with every context. */
export function sweepPoints(
  batches: readonly number[],
  contexts: readonly number[],
  outputTokens: number,
): readonly EnginePoint[] {
  return contexts.flatMap((promptTokens) => batches.map((batch) => ({ batch, promptTokens, outputTokens })));
}

/** Whole blocks that all sequences of a point may fill. */
export function pointBlocks(point: EnginePoint, blockTokens: number): number {
  return point.batch * Math.ceil(sequenceTokens(point) / blockTokens);
}

function reasonToSkip(session: EngineSession, point: EnginePoint): string | undefined {
  const { limits, kv } = session.runner;
  if (point.promptTokens + point.outputTokens > limits.maxContextTokens) {
    return `sequences hold at most ${limits.maxContextTokens} tokens`;
  }
  const blocks = pointBlocks(point, kv.blockTokens);
  if (blocks > limits.numPages) {
    return `the batch needs ${blocks * kv.blockTokens} tokens of KV, ${limits.numPages * kv.blockTokens} fit`;
  }
  return undefined;
}

/** Runs the points in order; what does not fit is skipped with the reason. */
export async function measureSweep(
  session: EngineSession,
  points: readonly EnginePoint[],
  onRow: (row: SweepRow) => void,
): Promise<SweepRow[]> {
  const rows: SweepRow[] = [];
  for (const point of points) {
    const skipped = reasonToSkip(session, point);
    const row = skipped === undefined ? await measurePoint(session, point) : { ...point, skipped };
    rows.push(row);
    onRow(row);
  }
  return rows;
}

/** Decode and prefill speed over the batch, a line for each context, and where the memory goes. */
export function sweepCharts(rows: readonly SweepRow[]): readonly (readonly [string, Chart])[] {
  const measured = rows.filter((row): row is EnginePointResult => !("skipped" in row));
  const first = measured[0];
  if (first === undefined) return [];
  const batches = [...new Set(measured.map(({ batch }) => batch))];
  const contexts = [...new Set(measured.map(({ promptTokens }) => promptTokens))];
  const title = `${first.model}, KV ${first.kvFormat}`;
  const speed = (name: string, of: (row: EnginePointResult) => number): Chart => ({
    title: `${title}: ${name}`,
    unit: "tokens/s",
    kind: "lines",
    categories: batches.map((batch) => `batch ${batch}`),
    series: contexts.map((context) => ({
      name: `context ${context}`,
      values: batches.map((batch) => {
        const row = measured.find((each) => each.batch === batch && each.promptTokens === context);
        return row === undefined ? undefined : of(row);
      }),
    })),
  });
  const { total: _total, kv: _kv, ...parts } = first.peakGpuBytes;
  const memory: Chart = {
    title: `${title}: GPU memory`,
    unit: "bytes",
    kind: "stacked",
    categories: [title],
    series: Object.entries(parts).map(([name, value]) => ({ name, values: [value] })),
  };
  return [
    ["decode", speed("decode", ({ decodeTokensPerSecond }) => decodeTokensPerSecond)],
    ["prefill", speed("prefill", ({ prefillTokensPerSecond }) => prefillTokensPerSecond)],
    ["memory", memory],
  ];
}
