// Several prompts that start together, so that one can see them move as one batch.

import { byId, say } from "./dom.js";
import { many, rate } from "./format.js";
import { Pane } from "./pane.js";

const REDRAW_MS = 250;

// No more than five prompts: a browser opens six HTTP/1.1 connections to a server, each stream holds one, and what the page shows
// beside them needs one too.

/** Wires the playground up. `paneOf(id)` of what it returns: the number of the pane whose request has that id, if any. */
export function startPlayground() {
  const panes = [];
  let running = null; // an AbortController while answers come

  const setCount = () => resizePanes(panes, Number(byId("count").value));
  byId("count").addEventListener("change", setCount);
  setCount();

  byId("stop").addEventListener("click", () => running?.abort());
  byId("playground").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!running) byId("playground-form").requestSubmit();
    }
  });
  byId("playground-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    await runAll(panes, sampling(), running.signal);
    running = null;
  });

  return { paneOf: (id) => panes.find((pane) => pane.ids.has(id))?.number };
}

function resizePanes(panes, wanted) {
  while (panes.length > wanted) panes.pop().remove();
  while (panes.length < wanted) panes.push(new Pane(panes.length + 1, byId("panes")));
}

/** What all panes ask for alike. */
function sampling() {
  const seed = byId("seed").value;
  return {
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    ...(seed === "" ? {} : { seed: Number(seed) }),
  };
}

async function runAll(panes, options, signal) {
  const started = performance.now();
  const redraw = setInterval(() => showTogether(panes, started), REDRAW_MS);
  setBusy(true);
  say(byId("playground-status"), `${many(panes.length, "prompt")} started`);
  await Promise.all(panes.map((pane) => pane.run(options, signal)));
  clearInterval(redraw);
  showTogether(panes, started);
  setBusy(false);
  const failed = panes.filter((pane) => pane.state === "failed").length;
  say(byId("playground-status"), signal.aborted ? "Stopped" : failed ? `${many(failed, "answer")} failed` : "All answers have come");
}

function setBusy(busy) {
  const focused = document.activeElement;
  byId("run").disabled = busy;
  byId("stop").disabled = !busy;
  byId("count").disabled = busy;
  // A button that is switched off would lose the focus to the page's beginning.
  if (focused === byId("run") && busy) byId("stop").focus();
  if (focused === byId("stop") && !busy) byId("run").focus();
}

function showTogether(panes, started) {
  const tokens = panes.reduce((sum, pane) => sum + pane.tokens, 0);
  const last = Math.max(...panes.map((pane) => pane.lastAt ?? 0));
  const words = tokens ? `${many(panes.length, "stream")}, ${rate((1000 * tokens) / (last - started))} tok/s together` : "";
  say(byId("together"), words);
}
