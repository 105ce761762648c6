// The head of the page, the tiles, latency, totals, batches.

import { byId, make, mark, resize, say } from "./dom.js";
import { count, duration, many, milliseconds, percent, rate, seconds, shortCount, total } from "./format.js";

const HEALTH = { ok: "healthy", loading: "loading", draining: "draining", wedged: "stuck", failed: "failed" };
const LATENCIES = [["queue", "In the queue"], ["ttft", "First token"], ["itl", "Between tokens"], ["e2e", "Whole answer"]];
const ENDINGS = [["stop", "finished"], ["length", "cut at their limit"], ["abort", "aborted"], ["timeout", "timed out"], ["error", "failed"]];

export function showHeader(state) {
  say(byId("model"), state.model);
  say(byId("version"), state.version);
  say(byId("uptime"), duration(state.uptime_seconds));
  showHealth(state.health, HEALTH[state.health] ?? state.health);
  const title = state.running || state.waiting ? `${count(state.running)} running · shoal` : "shoal";
  if (document.title !== title) document.title = title;
}

export function showHealth(health, words) {
  mark(byId("health"), "health", health);
  say(byId("health-text"), words);
}

export function showTiles(state) {
  const [, prompt, generation] = state.history.at(-1) ?? [0, null, null];
  const { kv_pages: pages, step, totals } = state;
  say(byId("generation-rate"), rate(generation));
  say(byId("generation-note"), state.running && generation ? `${rate(generation / state.running)} each` : " ");
  say(byId("prompt-rate"), rate(prompt));
  say(byId("prompt-note"), totals.prompt_tokens ? `${percent(totals.cached_tokens / totals.prompt_tokens)} % from the cache` : " ");
  say(byId("running"), count(state.running));
  say(byId("running-of"), `of ${count(state.max_num_seqs)}`);
  say(byId("running-note"), state.preemptions ? many(state.preemptions, "preemption") : "none preempted");
  say(byId("waiting"), count(state.waiting));
  say(byId("waiting-note"), state.waiting ? many(state.waiting_tokens, "token") : "nobody waits");
  showPages(pages.total ? pages.used / pages.total : 0, pages);
  say(byId("step-ms"), milliseconds(step.seconds));
  say(byId("step-note"), `${many(step.rows, "row")}${step.target_seconds ? `, aims at ${milliseconds(step.target_seconds)}` : ""}`);
}

function showPages(share, pages) {
  say(byId("kv-share"), percent(share));
  say(byId("kv-note"), `${count(pages.used)} of ${count(pages.total)}`);
  const meter = byId("kv-meter");
  meter.setAttribute("aria-valuenow", Math.round(100 * share));
  meter.firstElementChild.style.transform = `scaleX(${share})`;
  mark(meter, "full", share > 0.95);
}

export function showLatency(latency) {
  const body = byId("latency");
  resize(body, LATENCIES.length, (i) => make("tr", {}, make("th", { scope: "row", textContent: LATENCIES[i][1] }), make("td"), make("td")));
  LATENCIES.forEach(([name], i) => {
    const [, p50, p95] = body.children[i].children;
    say(p50, seconds(latency[name]?.p50));
    say(p95, seconds(latency[name]?.p95));
  });
}

export function showTotals({ totals }) {
  const rows = [["Tokens generated", totals.generation_tokens], ["Prompt tokens", totals.prompt_tokens]];
  for (const [ending, words] of ENDINGS) rows.push([`Requests ${words}`, totals.requests[ending] ?? 0]);
  const list = byId("totals");
  resize(list, 2 * rows.length, (i) => make(i % 2 ? "dd" : "dt"));
  rows.forEach(([words, n], i) => {
    say(list.children[2 * i], words);
    say(list.children[2 * i + 1], total(n));
  });
}

export function showBatches(batches) {
  const list = byId("batches");
  list.hidden = !batches.length;
  byId("batches-empty").hidden = batches.length > 0;
  resize(list, batches.length, makeBatch);
  batches.forEach((batch, i) => showBatch(list.children[i], batch));
}

function makeBatch() {
  const progress = make("progress", { max: 1 });
  return make("li", { className: "batch" }, make("span", { className: "batch-id" }), make("span", { className: "batch-count" }), progress, make("p", { className: "batch-words" }));
}

function showBatch(item, batch) {
  const [id, done, progress, words] = item.children;
  const finished = batch.completed + batch.failed;
  say(id, batch.id);
  say(done, `${shortCount(finished)} of ${shortCount(batch.total)}`);
  progress.value = batch.total ? finished / batch.total : 0;
  progress.setAttribute("aria-label", `Batch ${batch.id}`);
  const age = Math.max(0, Date.now() / 1000 - batch.created_at);
  const failed = batch.failed ? [make("b", {}, many(batch.failed, "row", "rows"), " failed"), " · "] : [];
  words.replaceChildren(`${batch.status.replaceAll("_", " ")} · `, ...failed, `made ${duration(age)} ago`);
}
