/** The arithmetic between recorded times and reported figures. */
import { describe, expect, it } from "vitest";
import { csv } from "./bench-files.ts";
import { decodeRates } from "./engine-point.ts";
import { decodeStepCost, type RecordedStep } from "./metered-runner.ts";
import { percentiles } from "./percentiles.ts";
import { axisTicks, type Chart, svgChart } from "./svg-chart.ts";
import { TokenGaps } from "./token-gaps.ts";

describe("decode rates", () => {
  it("count from the last sequence's first token until one of them has its tokens", () => {
    const times = [
      [1000, 1500, 2500, 3000, 3500, 4000],
      [2000, 2500, 3000, 3500],
    ];
    const rates = decodeRates(times, 2);
    expect(rates.seconds).toBe(1);
    expect(rates.tokensPerSecond).toBe(4);
  });

  it("are zero where no token follows the first", () => {
    expect(decodeRates([[5], [6]], 3)).toMatchObject({ tokensPerSecond: 0, seconds: 0 });
  });
});

describe("times between tokens", () => {
  it("are shared by tokens that come together", () => {
    const gaps: number[] = [];
    const mine = new TokenGaps(gaps);
    for (const [count, at] of [
      [1, 10],
      [2, 16],
      [1, 16],
      [1, 20],
      [1, 30],
    ] as const)
      mine.add(count, at);
    expect(gaps).toEqual([2, 2, 2, 4]);
  });

  it("have nearest-rank percentiles", () => {
    const values = Array.from({ length: 100 }, (_, index) => 100 - index);
    expect(percentiles(values)).toEqual({ p50: 50, p90: 90, p99: 99 });
    expect(percentiles([])).toBeUndefined();
  });
});

describe("the cost of a decode step", () => {
  const step = (at: number, fields: Partial<RecordedStep> = {}): RecordedStep => {
    return { at, prefillRows: 0, decodeRows: 4, decodeSteps: 1, encodeMs: 1, gpuMs: 5, ...fields };
  };

  it("is that of plans without prefill, divided by their steps", () => {
    const steps = [step(0), step(8, { decodeSteps: 4, gpuMs: 6, encodeMs: 2 }), step(50, { prefillRows: 128 })];
    expect(decodeStepCost(steps)).toEqual({ steps: 4, encodeMs: 0.5, gpuMs: 1.5, wallMs: 2 });
  });

  it("has no GPU time without a clock, and nothing without decoding", () => {
    expect(decodeStepCost([step(0), step(2, { gpuMs: undefined })])?.gpuMs).toBeUndefined();
    expect(decodeStepCost([step(0, { decodeRows: 0, decodeSteps: 0 })])).toBeUndefined();
  });
});

describe("files", () => {
  it("CSV has a column for every field, and quotes what needs it", () => {
    const rows = [
      { name: 'a "b", c', peak: { weights: 1 } },
      { name: "d", skipped: "no" },
    ];
    expect(csv(rows)).toBe('name,peak.weights,skipped\n"a ""b"", c",1,\nd,,no\n');
  });

  it("an axis ends at or above the largest value", () => {
    for (const most of [0.003, 1, 7, 10, 99, 101, 12_345, 2 ** 36]) {
      const ticks = axisTicks(most);
      expect(ticks.at(-1), String(most)).toBeGreaterThanOrEqual(most * (1 - 1e-9));
      expect(ticks.length).toBeLessThanOrEqual(7);
    }
  });

  it.each(["bars", "stacked", "lines"] as const)(
    "a chart of %s draws every value inside, and escapes names",
    (kind) => {
      const chart: Chart = {
        title: "a < b",
        unit: "x",
        kind,
        categories: ["one", "two"],
        series: [
          { name: "R&D", values: [1, 4] },
          { name: "none", values: [undefined, 2] },
        ],
      };
      const svg = svgChart(chart);
      expect(svg).toContain("a &lt; b");
      expect(svg).toContain("R&amp;D");
      const marks = [
        ...svg.matchAll(
          /<(?:rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"|circle cx="[\d.]+" cy="([\d.]+)")[^>]*><title>/g,
        ),
      ];
      expect(marks).toHaveLength(3);
      for (const [, y, height, cy] of marks) {
        expect(Number(y ?? cy)).toBeGreaterThanOrEqual(70);
        expect(Number(y ?? cy) + Number(height ?? 0)).toBeLessThanOrEqual(420);
      }
      expect(() => svgChart({ ...chart, series: [] })).toThrow(/empty/);
    },
  );
});
