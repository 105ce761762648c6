// Once a second: what the server is doing, into every part of the page.

import { KeyNeeded, fetchState } from "./api.js";
import { startCharts } from "./charts.js";
import { byId, say } from "./dom.js";
import { askForKey, startKey } from "./key.js";
import { showBatches, showHeader, showHealth, showLatency, showTiles, showTotals } from "./panels.js";
import { startPlayground } from "./playground.js";
import { startSlots } from "./slots.js";
import { startTheme } from "./theme.js";

const PERIOD_MS = 1000;

// What a server cannot tell yet while it loads its model.
const NOT_YET = {
  step: { number: 0, seconds: null, rows: 0, target_seconds: null },
  running: null,
  waiting: null,
  kv_pages: { used: 0, total: 0 },
  preemptions: 0,
  totals: { requests: {} },
};

startTheme();
startKey();
const playground = startPlayground();
const showSlots = startSlots(playground.paneOf);
const showCharts = startCharts();
watch();

async function watch() {
  for (;;) {
    await untilVisible();
    const started = performance.now();
    await refresh();
    await sleep(Math.max(100, PERIOD_MS - (performance.now() - started)));
  }
}

async function refresh() {
  let state;
  try {
    state = await fetchState();
  } catch (error) {
    await trouble(error);
    return;
  }
  allIsWell();
  show({ ...NOT_YET, ...state });
}

function show(state) {
  showHeader(state);
  showTiles(state);
  showSlots(state);
  showLatency(state.latency);
  showTotals(state);
  showCharts(state.history);
  showBatches(state.batches);
}

function allIsWell() {
  byId("banner").hidden = true;
  byId("main").classList.remove("stale");
}

async function trouble(error) {
  byId("main").classList.add("stale");
  if (error instanceof KeyNeeded) {
    showHealth("gone", "key needed");
    await askForKey();
    return;
  }
  showHealth("gone", "no answer");
  say(byId("banner"), `The server does not answer: ${error.message}. Trying again.`);
  byId("banner").hidden = false;
}

function untilVisible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
