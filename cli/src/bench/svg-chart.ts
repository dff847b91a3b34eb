/** Bars and lines as SVG text: what a bench's report needs, without a browser. */

export interface ChartSeries {
  readonly name: string;
  /** One value for each category; undefined where there is none. */
  readonly values: readonly (number | undefined)[];
}

export interface Chart {
  readonly title: string;
  /** Of the values: "output tokens/s". */
  readonly unit: string;
  readonly kind: "bars" | "stacked" | "lines";
  /** Along the x axis. */
  readonly categories: readonly string[];
  readonly series: readonly ChartSeries[];
}

const WIDTH = 860;
const HEIGHT = 420;
const LEFT = 84;
const RIGHT = 20;
const TOP = 78;
const BOTTOM = 58;
/** Okabe and Ito's palette: told apart by colour-blind readers too. */
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999"];

function escaped(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}

/** 0, and up to six steps of 1, 2 or 5 times a power of ten, the last one not below `most`. */
export function axisTicks(most: number): number[] {
  const rough = Math.max(most, Number.MIN_VALUE) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10) * power;
  const count = Math.max(1, Math.ceil(most / step - 1e-9));
  return Array.from({ length: count + 1 }, (_, index) => index * step);
}

/** 12345 is "12.3k". */
function short(value: number): string {
  const units: readonly [number, string][] = [
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ];
  for (const [size, unit] of units) if (value >= size) return `${Number((value / size).toPrecision(3))}${unit}`;
  return `${Number(value.toPrecision(3))}`;
}

function text(x: number, y: number, content: string, attributes = ""): string {
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${attributes}>${escaped(content)}</text>`;
}

/** Positions in the drawing. */
class Plane {
  readonly ticks: readonly number[];
  readonly slot: number;
  readonly #top: number;

  constructor(chart: Chart) {
    const totals = chart.categories.map((_, index) => chart.series.map(({ values }) => values[index] ?? 0));
    const most = totals.map((values) =>
      chart.kind === "stacked" ? values.reduce((sum, value) => sum + value, 0) : Math.max(0, ...values),
    );
    this.ticks = axisTicks(Math.max(...most, 0));
    this.#top = this.ticks.at(-1) as number;
    this.slot = (WIDTH - LEFT - RIGHT) / chart.categories.length;
  }

  y(value: number): number {
    return HEIGHT - BOTTOM - (value / this.#top) * (HEIGHT - TOP - BOTTOM);
  }

  centre(index: number): number {
    return LEFT + (index + 0.5) * this.slot;
  }
}

function axes(chart: Chart, plane: Plane): string[] {
  const lines = plane.ticks.map((tick) => {
    const y = plane.y(tick).toFixed(1);
    return `<line x1="${LEFT}" x2="${WIDTH - RIGHT}" y1="${y}" y2="${y}" stroke="#ddd"/>${text(LEFT - 8, plane.y(tick) + 4, short(tick), 'text-anchor="end"')}`;
  });
  const labels = chart.categories.map((category, index) =>
    text(plane.centre(index), HEIGHT - BOTTOM + 20, category, 'text-anchor="middle"'),
  );
  return [...lines, ...labels, text(LEFT - 8, TOP - 12, chart.unit, 'text-anchor="end" fill="#555"')];
}

function bars(chart: Chart, plane: Plane): string[] {
  const stacked = chart.kind === "stacked";
  const width = (plane.slot * 0.78) / (stacked ? 1 : chart.series.length);
  return chart.categories.flatMap((_, index) => {
    let below = 0;
    return chart.series.flatMap(({ name, values }, series) => {
      const value = values[index];
      if (value === undefined) return [];
      const left = plane.centre(index) + (stacked ? -0.5 : series - chart.series.length / 2) * width;
      const [low, high] = stacked ? [below, below + value] : [0, value];
      below = high;
      const box = `<rect x="${left.toFixed(1)}" y="${plane.y(high).toFixed(1)}" width="${(width * 0.94).toFixed(1)}" height="${(plane.y(low) - plane.y(high)).toFixed(1)}" fill="${COLOURS[series % COLOURS.length]}"><title>${escaped(`${name}: ${value}`)}</title></rect>`;
      return stacked
        ? [box]
        : [box, text(left + width * 0.47, plane.y(high) - 4, short(value), 'text-anchor="middle" font-size="11"')];
    });
  });
}

function lines(chart: Chart, plane: Plane): string[] {
  return chart.series.flatMap(({ name, values }, series) => {
    const colour = COLOURS[series % COLOURS.length];
    const points = values.flatMap((value, index) =>
      value === undefined ? [] : [{ value, x: plane.centre(index).toFixed(1), y: plane.y(value).toFixed(1) }],
    );
    const path = points.map(({ x, y }) => `${x},${y}`).join(" ");
    return [
      `<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="2"/>`,
      ...points.map(
        ({ value, x, y }) =>
          `<circle cx="${x}" cy="${y}" r="4" fill="${colour}"><title>${escaped(`${name}: ${value}`)}</title></circle>`,
      ),
    ];
  });
}

function legend(chart: Chart): string[] {
  const width = (WIDTH - LEFT - RIGHT) / Math.max(chart.series.length, 4);
  return chart.series.flatMap(({ name }, series) => {
    const x = LEFT + series * width;
    return [
      `<rect x="${x.toFixed(1)}" y="40" width="12" height="12" fill="${COLOURS[series % COLOURS.length]}"/>`,
      text(x + 18, 51, name),
    ];
  });
}

/** The whole file. @throws RangeError for a chart without categories or series. */
export function svgChart(chart: Chart): string {
  if (chart.categories.length === 0 || chart.series.length === 0)
    throw new RangeError(`chart "${chart.title}" is empty`);
  const plane = new Plane(chart);
  const marks = chart.kind === "lines" ? lines(chart, plane) : bars(chart, plane);
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" width="${WIDTH}" height="${HEIGHT}" font-family="sans-serif" font-size="13">
<rect width="100%" height="100%" fill="white"/>
${text(LEFT, 26, chart.title, 'font-size="16" font-weight="bold"')}
${[...legend(chart), ...axes(chart, plane), ...marks].join("\n")}
</svg>
`;
}
