// The batch: who sits in which slot, what the last step did for each, who is next in line.

import { byId, make, mark, resize, say } from "./dom.js";
import { count, many, milliseconds, seconds, shortCount } from "./format.js";

const READABLE = 48; // slots; more are drawn as small squares
const IN_LINE = 10; // are shown; the others are counted
const RUNNING = new Set(["prefill", "decode"]);

/** Returns what shows a state. `paneOf(id)`: the number of the playground's pane that made a request, if one did. */
export function startSlots(paneOf) {
  const places = new Map(); // id -> slot: a sequence stays where it sat down
  return (state) => {
    const running = state.slots.filter((slot) => RUNNING.has(slot.state));
    seat(places, running.map((slot) => slot.id));
    const seats = new Array(Math.max(state.max_num_seqs, ...[...places.values()].map((place) => place + 1))).fill(null);
    for (const slot of running) seats[places.get(slot.id)] = slot;
    showSeats(seats, paneOf);
    showStep(state.step, seats.filter((slot) => slot?.rows));
    showLine(state.slots.filter((slot) => !RUNNING.has(slot.state)), state.waiting, paneOf);
  };
}

function seat(places, ids) {
  const present = new Set(ids);
  for (const id of places.keys()) if (!present.has(id)) places.delete(id);
  const taken = new Set(places.values());
  let free = 0;
  for (const id of ids) {
    if (places.has(id)) continue;
    while (taken.has(free)) free += 1;
    places.set(id, free);
    taken.add(free);
  }
}

function showSeats(seats, paneOf) {
  const list = byId("slots");
  const dense = seats.length > READABLE;
  list.classList.toggle("dense", dense);
  resize(list, seats.length, makeSeat);
  seats.forEach((slot, i) => {
    const item = list.children[i];
    if (slot) showSlot(item, slot, paneOf(slot.id), dense);
    else showFree(item, i, dense);
  });
}

function makeSeat() {
  const part = (name) => make("span", { className: name });
  return make("li", { className: "slot" }, make("i", { className: "slot-fill" }), part("slot-what"), part("slot-count"), part("slot-who"), part("slot-age"));
}

function showSlot(item, slot, pane, dense) {
  const [fill, what, done, who, age] = item.children;
  const [have, limit] = progress(slot);
  mark(item, "state", slot.state);
  mark(item, "mine", pane);
  mark(fill, "endless", limit == null);
  const share = limit ? Math.min(1, have / limit) : 0;
  if (item.dataset.id !== slot.id) restart(fill);
  item.dataset.id = slot.id;
  fill.style.transform = dense ? `scaleY(${share})` : `scaleX(${share})`;
  say(what, slot.state);
  say(done, limit == null ? shortCount(have) : `${shortCount(have)} / ${shortCount(limit)}`);
  say(who, name(slot, pane) + (slot.rows > 1 ? ` · +${count(slot.rows)}` : ""));
  say(age, seconds(slot.age_seconds));
  describe(item, dense, `${slot.state}, ${many(have, "token")}${limit == null ? "" : ` of ${count(limit)}`}, ${name(slot, pane)}, ${slot.id}`);
}

function showFree(item, place, dense) {
  const [fill, what, ...others] = item.children;
  mark(item, "state", "free");
  mark(item, "mine", null);
  mark(item, "id", null);
  fill.style.transform = "";
  say(what, "free");
  for (const other of others) say(other, "");
  describe(item, dense, `slot ${place + 1} is free`);
}

/** Squares have no room for words; the others have none for ids. */
function describe(item, dense, words) {
  item.title = words;
  if (dense) item.setAttribute("aria-label", words);
  else item.removeAttribute("aria-label");
}

/** Another sequence has sat down: its bar does not shrink from the old one's length. */
function restart(fill) {
  fill.style.transition = "none";
  fill.style.transform = "scale(0, 1)";
  fill.getBoundingClientRect();
  fill.style.transition = "";
}

function progress(slot) {
  return slot.state === "prefill" ? [slot.computed_tokens, slot.prompt_tokens] : [slot.output_tokens, slot.max_tokens];
}

/** Whose it is: a pane's, a key's, or nobody's, who go by the end of their ids. */
function name(slot, pane) {
  return pane ? `prompt ${pane}` : slot.owner.slice(0, 12) || slot.id.slice(-8);
}

/** What the last step did for a sequence, which by now may decode: with several rows it read the last of its prompt. */
function computed(slot) {
  return slot.rows > 1 ? "prefill" : slot.state;
}

function showStep(step, rowed) {
  const bar = byId("step-bar");
  resize(bar, rowed.length, () => make("i"));
  rowed.forEach((slot, i) => {
    mark(bar.children[i], "state", computed(slot));
    bar.children[i].style.flexGrow = slot.rows;
  });
  const prompt = rowed.filter((slot) => computed(slot) === "prefill").reduce((sum, slot) => sum + slot.rows, 0);
  const words = rowed.length ? `: ${many(step.rows, "row")} of ${many(rowed.length, "sequence")} in ${milliseconds(step.seconds)} ms` : step.number ? ", idle now" : "";
  const also = prompt ? `, ${many(prompt, "row")} of prompts` : "";
  byId("step-words").replaceChildren(make("strong", {}, step.number ? `Step ${count(step.number)}` : "No step yet"), words + also);
  bar.setAttribute("aria-label", `Rows of the last step${words}${also}`);
}

/** Of a long line the server tells the beginning and how many there are. */
function showLine(slots, waiting, paneOf) {
  const line = [...slots].sort((a, b) => (a.state === "waiting") - (b.state === "waiting"));
  const shown = line.slice(0, IN_LINE);
  const more = Math.max(line.length, waiting) - shown.length;
  const list = byId("chips");
  byId("line").hidden = !line.length;
  resize(list, shown.length + (more > 0), () => make("li"));
  shown.forEach((slot, i) => showChip(list.children[i], slot, paneOf(slot.id)));
  if (more > 0) {
    mark(list.lastElementChild, "state", null);
    mark(list.lastElementChild, "mine", null);
    say(list.lastElementChild, `and ${count(more)} more`);
  }
}

function showChip(item, slot, pane) {
  mark(item, "state", slot.state);
  mark(item, "mine", pane);
  const state = slot.state === "preempted" ? "preempted, " : "";
  say(item, `${name(slot, pane)} · ${state}${many(slot.prompt_tokens + slot.output_tokens, "token")} · ${seconds(slot.age_seconds)}`);
}
