/** Dark, light, or as the system says. */

import { icon } from "./dom.js";
import { keep, kept } from "./storage.js";

const dark = matchMedia("(prefers-color-scheme: dark)");

/** @returns {"dark" | "light"} what is on the screen now */
function shown() {
  const { theme } = document.documentElement.dataset;
  return theme === "dark" || theme === "light" ? theme : dark.matches ? "dark" : "light";
}

/** Let a button switch; a choice that is the system's own again is forgotten, so that the page follows the system.
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
