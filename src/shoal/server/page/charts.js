// Four charts of the last two minutes.

import { byId, make, say } from "./dom.js";
import { count, milliseconds, percent, rate } from "./format.js";
import uPlot from "./vendor/uPlot.js";

const SPAN = 120; // seconds
const TICKS = [120, 60, 0]; // seconds ago

// `column`: of the history's rows. `tone`: a class that has the colour. `words`: a value as text; `tick`: one beside the axis.
// `least` and `most`: where the axis ends. `incrs`: what may lie between two of these.
const CHARTS = [
  {
    id: "chart-rates",
    title: "Tokens per second",
    series: [{ name: "generated", column: 2, tone: "decode" }, { name: "prompt", column: 1, tone: "prefill" }],
    words: rate,
    least: 10,
  },
  {
    id: "chart-requests",
    title: "Requests",
    series: [{ name: "running", column: 3, tone: "decode" }, { name: "waiting", column: 4, tone: "waiting" }],
    words: count,
    least: 4,
    incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000],
  },
  { id: "chart-kv", title: "KV pages", series: [{ name: "in use", column: 5, tone: "decode" }], words: (v) => `${percent(v)} %`, most: 1 },
  { id: "chart-step", title: "Step time", series: [{ name: "mean", column: 6, tone: "prefill" }], words: (v) => `${milliseconds(v)} ms`, tick: (v) => `${count(1000 * v)} ms`, least: 0.01 },
];

/** Returns what shows a history. */
export function startCharts() {
  const charts = CHARTS.map((spec) => new Chart(spec));
  document.addEventListener("themechange", () => charts.forEach((chart) => chart.draw()));
  return (history) => charts.forEach((chart) => chart.show(history));
}

class Chart {
  constructor(spec) {
    this.spec = spec;
    this.data = [[], ...spec.series.map(() => [])];
    this.values = spec.series.map(() => make("b"));
    const labels = spec.series.map((series, i) => make("span", {}, make("i", { className: `swatch ${series.tone}` }), `${series.name} `, this.values[i]));
    this.plot = make("div", { className: "chart-plot", ariaHidden: "true" }); // what it shows is said in words beside it
    byId(spec.id).append(make("h3", {}, spec.title), make("p", { className: "chart-values" }, ...labels), this.plot);
    this.swatches = byId(spec.id).querySelectorAll(".swatch");
    this.draw();
    new ResizeObserver(() => this.chart.setSize(this.size())).observe(this.plot);
  }

  show(history) {
    this.data = [0, ...this.spec.series.map((series) => series.column)].map((column) => history.map((row) => row[column]));
    this.chart.setData(this.data);
    this.sayValues(this.chart.cursor.idx);
  }

  /** Made anew for every theme: a canvas does not follow style sheets. */
  draw() {
    this.chart?.destroy();
    this.chart = new uPlot(options(this), this.data, this.plot);
  }

  size() {
    return { width: Math.max(120, this.plot.clientWidth), height: this.plot.clientHeight };
  }

  /** Those under the pointer, otherwise the newest. */
  sayValues(index) {
    const at = index ?? this.data[0].length - 1;
    this.values.forEach((value, i) => say(value, this.spec.words(this.data[i + 1][at])));
  }
}

function options(chart) {
  const style = getComputedStyle(document.body);
  const faint = getComputedStyle(chart.plot.previousElementSibling).color;
  const line = getComputedStyle(byId(chart.spec.id)).borderTopColor;
  const axis = { stroke: faint, font: `11px ${style.fontFamily}`, ticks: { show: false }, grid: { stroke: line, width: 1 } };
  return {
    ...chart.size(),
    padding: [8, 16, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, sync: { key: "shoal" }, points: { size: 7 } },
    scales: {
      x: { time: false, range: (_, low, high) => (high == null ? [0, SPAN] : [high - SPAN, high]) },
      y: { range: (_, low, high) => [0, chart.spec.most ?? Math.max(high * 1.1, chart.spec.least)] },
    },
    axes: [
      { ...axis, size: 22, grid: { show: false }, splits: (_, i, low, high) => TICKS.map((ago) => high - ago), values: (u, at) => at.map((t) => ago(u.scales.x.max - t)) },
      { ...axis, size: 44, space: 32, incrs: chart.spec.incrs, values: (_, ticks) => ticks.map(chart.spec.tick ?? chart.spec.words) },
    ],
    series: [{}, ...chart.spec.series.map((series, i) => lineOf(getComputedStyle(chart.swatches[i]).backgroundColor))],
    hooks: { setCursor: [(u) => chart.sayValues(u.cursor.idx)] },
  };
}

function lineOf(colour) {
  return { stroke: colour, width: 1.75, fill: `color-mix(in srgb, ${colour} 12%, transparent)`, points: { show: false } };
}

function ago(seconds) {
  return seconds ? `−${Math.round(seconds)} s` : "now";
}
