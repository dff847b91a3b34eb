/** Where commands write: results to standard output, notices and errors to standard error. */
export interface Output {
  /** Part of a result, as it is. */
  write(text: string): void;
  line(text?: string): void;
  json(value: unknown): void;
  /** Something to know that is not the result. */
  notice(text: string): void;
}

export const terminal: Output = {
  write: (text) => {
    process.stdout.write(text);
  },
  line: (text = "") => {
    process.stdout.write(`${text}\n`);
  },
  json: (value) => {
    process.stdout.write(`${JSON.stringify(value, undefined, 2)}\n`);
  },
  notice: (text) => {
    process.stderr.write(`kivimesh: ${text}\n`);
  },
};

/** Columns of equal width, numbers to the right. */
export function formatTable(header: readonly string[], rows: readonly (readonly (string | number)[])[]): string {
  const cells = [header, ...rows].map((row) => row.map(String));
  const widths = header.map((_, column) => Math.max(...cells.map((row) => row[column]?.length ?? 0)));
  const numeric = header.map((_, column) => rows.length > 0 && rows.every((row) => typeof row[column] === "number"));
  return cells
    .map((row) =>
      row
        .map((cell, column) =>
          numeric[column] === true ? cell.padStart(widths[column] ?? 0) : cell.padEnd(widths[column] ?? 0),
        )
        .join("  ")
        .trimEnd(),
    )
    .join("\n");
}

const BINARY_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** Bytes for people: 1536 is "1.5 KiB". */
export function formatBytes(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < BINARY_UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${BINARY_UNITS[unit]}`;
}
