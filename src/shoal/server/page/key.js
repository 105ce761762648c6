// Asks for the API key, once for all who need it.

import { hasKey, keepKey } from "./api.js";
import { byId, say } from "./dom.js";

let asking = null; // a promise while someone waits for a key

/** Resolves when a key has been entered, which may be never. */
export function askForKey() {
  if (asking === null) {
    say(byId("key-why"), hasKey() ? "The key it has been given is not one of its keys." : "It stays in this tab and is forgotten when you close it.");
    asking = new Promise((resolve) => byId("key-form").addEventListener("submit", () => resolve(), { once: true }));
    asking.then(() => (asking = null));
    openDialog();
  }
  return asking;
}

export function startKey() {
  byId("key-button").addEventListener("click", openDialog);
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepKey(byId("key-input").value.trim());
    byId("key-input").value = "";
    byId("key-dialog").close();
  });
}

function openDialog() {
  byId("key-button").hidden = false;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
  byId("key-input").focus();
}
