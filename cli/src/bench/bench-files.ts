/** Files of a bench: JSON, CSV and plots. */
import { spawnSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { type Chart, svgChart } from "./svg-chart.ts";

type Cell = string | number | boolean | undefined;

/** Nested objects become columns such as `peakGpuBytes.weights`. */
function flattened(value: object, prefix = ""): Map<string, Cell> {
  const cells = new Map<string, Cell>();
  for (const [name, field] of Object.entries(value) as [string, unknown][]) {
    if (typeof field === "object" && field !== null) {
      for (const [inner, cell] of flattened(field, `${prefix}${name}.`)) cells.set(inner, cell);
    } else {
      cells.set(`${prefix}${name}`, field as Cell);
    }
  }
  return cells;
}

/** Comma-separated values with a header (RFC 4180); a column for every field that any row has. */
export function csv(rows: readonly object[]): string {
  const flat = rows.map((row) => flattened(row));
  const columns = [...new Set(flat.flatMap((row) => [...row.keys()]))];
  const cell = (value: Cell) => {
    const text = value === undefined ? "" : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...flat.map((row) => columns.map((column) => row.get(column)))]
    .map((line) => line.map(cell).join(","))
    .join("\n")
    .concat("\n");
}

/** Programs that turn SVG into PNG, where one is installed. */
const RASTERIZERS: readonly (readonly [string, (svg: string, png: string) => string[]])[] = [
  ["resvg", (svg, png) => [svg, png]],
  ["rsvg-convert", (svg, png) => ["-o", png, svg]],
];

function rasterize(svg: string, png: string): boolean {
  return RASTERIZERS.some(([program, args]) => spawnSync(program, args(svg, png), { stdio: "ignore" }).status === 0);
}

/**
 * Writes BASE.json, BASE.csv and BASE-NAME.svg for each chart, as PNG too where `resvg` or `rsvg-convert` is installed.
 * @returns the files' names.
 */
export function writeBenchFiles(
  base: string,
  rows: readonly object[],
  charts: readonly (readonly [string, Chart])[],
): string[] {
  mkdirSync(dirname(base), { recursive: true });
  const files = [`${base}.json`, `${base}.csv`];
  writeFileSync(`${base}.json`, `[\n${rows.map((row) => JSON.stringify(row)).join(",\n")}\n]\n`);
  writeFileSync(`${base}.csv`, csv(rows));
  for (const [name, chart] of charts) {
    const svg = `${base}-${name}.svg`;
    writeFileSync(svg, svgChart(chart));
    files.push(svg);
    const png = `${base}-${name}.png`;
    if (rasterize(svg, png)) files.push(png);
  }
  return files;
}
