// The server: its state, its chat streams, and the key. Paths are relative, so that the page works below a prefix of a proxy.

const KEY = "shoal.key"; // in sessionStorage: of this tab, until it is closed
const STATE_TIMEOUT_MS = 10_000;

/** The server wants a key, or another one. */
export class KeyNeeded extends Error {}

/** The server says no, in its own words. */
export class Refused extends Error {}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** What the server is doing; docs/server.md has its fields. Throws KeyNeeded, Refused, or what fetch throws. */
export async function fetchState() {
  const response = await send("page/state", { signal: AbortSignal.timeout(STATE_TIMEOUT_MS) });
  const state = await response.json();
  model = state.model;
  return state;
}

let model; // as requests call it

/** Opens a streamed chat completion; `events` reads it. Throws as `fetchState` does. */
export function openChat(body, signal) {
  return send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model, ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
}

/** The chunks of a stream. Throws Refused for an error in the stream, and for one that ends before its end. */
export async function* events(response) {
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message ?? String(chunk.error));
    yield chunk;
  }
  throw new Refused("the stream broke off");
}

async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (buffer + value).split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // a reader that leaves early tells the server so
  }
}

async function send(path, options) {
  const headers = new Headers(options.headers);
  if (hasKey()) headers.set("Authorization", `Bearer ${sessionStorage.getItem(KEY)}`);
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const message = await errorMessage(response);
  throw response.status === 401 ? new KeyNeeded(message) : new Refused(message);
}

async function errorMessage(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText || text.slice(0, 200)}`;
  }
}
