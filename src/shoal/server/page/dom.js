// What the other modules need of the document. Text goes in as text only: nothing here, and nothing elsewhere, makes HTML of it.

export const byId = (id) => document.getElementById(id);

/** A new element: `make("li", { className: "slot" }, "text", child)`. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Sets text only where it is another one, so that selections and screen readers are left in peace. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Sets or, with null or false, takes away a data attribute. */
export function mark(element, name, value) {
  if (value == null || value === false) delete element.dataset[name];
  else if (element.dataset[name] !== String(value)) element.dataset[name] = value;
}

/** Gives `parent` exactly `wanted` children, made by `makeOne(index)`. */
export function resize(parent, wanted, makeOne) {
  while (parent.children.length > wanted) parent.lastElementChild.remove();
  while (parent.children.length < wanted) parent.append(makeOne(parent.children.length));
}
