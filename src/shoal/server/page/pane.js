// One prompt of the playground, its answer, and how fast that came.

import { KeyNeeded, events, openChat } from "./api.js";
import { byId, say } from "./dom.js";
import { count, rate, seconds } from "./format.js";
import { askForKey } from "./key.js";

const PROMPTS = [
  "Explain in three sentences why ships float.",
  "Write a short poem about a shoal of herring.",
  "List five things to see in Lisbon.",
  "What is the difference between a list and a tuple in Python?",
  "Tell a story that begins in a lighthouse.",
];
const ENDINGS = { stop: "finished", length: "at its limit", timeout: "timed out", tool_calls: "finished", content_filter: "finished" };
const FOLLOW_PX = 24; // nearer to the end than this, an answer is followed as it grows

export class Pane {
  constructor(number, parent) {
    const root = byId("pane-template").content.firstElementChild.cloneNode(true);
    this.number = number;
    this.root = root;
    this.part = (name) => root.querySelector(`.${name}`);
    this.ids = new Set(); // what the server calls the request
    const prompt = this.part("prompt");
    prompt.id = `prompt-${number}`;
    prompt.value = PROMPTS[number - 1];
    this.part("pane-label").htmlFor = prompt.id;
    say(this.part("pane-label"), `Prompt ${number}`);
    this.part("reply").setAttribute("aria-label", `Answer ${number}`);
    this.clear();
    parent.append(root);
  }

  remove() {
    this.root.remove();
  }

  /** Asks, and shows the answer as it comes. Never throws: what goes wrong stands in the pane. */
  async run(options, signal) {
    this.clear();
    this.setState("waiting", "waiting");
    this.startedAt = performance.now();
    const messages = [{ role: "user", content: this.part("prompt").value }];
    try {
      const response = await openChat({ messages, ...options }, signal);
      this.know(response.headers.get("x-request-id"));
      for await (const chunk of events(response)) this.take(chunk);
      this.setState("done", ENDINGS[this.ending] ?? this.ending ?? "finished");
    } catch (error) {
      this.end(error, signal);
    }
    this.showMeasures();
  }

  clear() {
    this.ids.clear();
    this.tokens = 0;
    this.startedAt = this.firstAt = this.lastAt = this.ending = null;
    for (const name of ["reply", "thought-text", "trouble"]) this.part(name).replaceChildren();
    this.part("thought").hidden = this.part("trouble").hidden = true;
    this.setState("idle", "ready");
    this.showMeasures();
  }

  setState(state, words) {
    this.state = this.root.dataset.state = this.part("pane-state").dataset.state = state;
    say(this.part("pane-state"), words);
  }

  /** Answers are called chatcmpl-ID, the sequences behind them ID or the same. */
  know(id) {
    if (id) this.ids.add(id).add(id.replace(/^chatcmpl-/, ""));
  }

  take(chunk) {
    this.know(chunk.id);
    const choice = chunk.choices?.[0];
    const { content, reasoning_content: thought = choice?.delta?.reasoning } = choice?.delta ?? {};
    if (content || thought) this.takeText(content, thought);
    if (choice?.finish_reason) this.ending = choice.finish_reason;
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    this.showMeasures();
  }

  takeText(content, thought) {
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.tokens += 1; // about: the last chunk tells it exactly
    if (thought) {
      this.part("thought").hidden = false;
      append(this.part("thought-text"), thought);
    }
    if (content) append(this.part("reply"), content);
    if (this.state !== "streaming" || content) this.setState("streaming", content ? "streaming" : "thinking");
  }

  end(error, signal) {
    if (signal.aborted) {
      this.setState("stopped", "stopped");
      return;
    }
    this.setState("failed", "failed");
    say(this.part("trouble"), error.message);
    this.part("trouble").hidden = false;
    if (error instanceof KeyNeeded) askForKey();
  }

  showMeasures() {
    const wait = this.firstAt === null ? null : (this.firstAt - this.startedAt) / 1000;
    const streamed = (this.lastAt - this.firstAt) / 1000;
    say(this.part("ttft"), seconds(wait));
    say(this.part("rate"), streamed > 0 ? `${rate((this.tokens - 1) / streamed)} tok/s` : "–");
    say(this.part("tokens"), this.tokens ? count(this.tokens) : "–");
  }
}

function append(element, text) {
  const follow = element.scrollHeight - element.scrollTop - element.clientHeight < FOLLOW_PX;
  if (element.lastChild) element.lastChild.appendData(text);
  else element.append(text);
  if (follow) element.scrollTop = element.scrollHeight;
}
