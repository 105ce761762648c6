// Light, dark, or as the system has it. The choice stays in this browser.

const STORED = "shoal.theme";
const NAMES = { auto: "Auto", light: "Light", dark: "Dark" };
const SPOKEN = { auto: "as the system", light: "light", dark: "dark" };
const ORDER = Object.keys(NAMES);

function chosen() {
  const stored = localStorage.getItem(STORED);
  return ORDER.includes(stored) ? stored : "auto";
}

function apply(theme) {
  document.documentElement.dataset.theme = theme;
  document.dispatchEvent(new Event("themechange"));
}

function label(theme) {
  document.getElementById("theme-name").textContent = NAMES[theme];
  document.getElementById("theme-button").setAttribute("aria-label", `Theme: ${SPOKEN[theme]}`);
}

apply(chosen()); // this script holds drawing up until it has run: no flash of the other theme
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply(chosen()));

export function startTheme() {
  label(chosen());
  document.getElementById("theme-button").addEventListener("click", () => {
    const next = ORDER[(ORDER.indexOf(chosen()) + 1) % ORDER.length];
    localStorage.setItem(STORED, next);
    apply(next);
    label(next);
  });
}
