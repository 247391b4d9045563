/** The color theme: dark, light, or the system's. */

import { icon } from "./dom.js";
import { keep, kept } from "./storage.js";

const dark = matchMedia("(prefers-color-scheme: dark)");

/** @returns {"dark" | "light"} the current theme */
function shown() {
  const { theme } = document.documentElement.dataset;
  return theme === "dark" || theme === "light" ? theme : dark.matches ? "dark" : "light";
}

/** Make a button switch the theme. A choice equal to the system's theme is deleted, so that the page follows it.
 * @param {HTMLButtonElement} button */
export function switchTheme(button) {
  const draw = () => {
    const other = shown() === "dark" ? "light" : "dark";
    button.replaceChildren(icon(other === "dark" ? "moon" : "sun"));
    button.setAttribute("aria-label", `Switch to ${other}`);
    button.title = `Switch to ${other}`;
  };
  button.addEventListener("click", () => {
    const other = shown() === "dark" ? "light" : "dark";
    const follows = other === (dark.matches ? "dark" : "light");
    if (follows) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = other;
    keep("theme", follows ? null : other);
    draw();
  });
  if (kept("theme") === null) delete document.documentElement.dataset.theme;
  dark.addEventListener("change", draw);
  draw();
}
