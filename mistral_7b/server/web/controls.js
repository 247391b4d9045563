/** The buttons of the header, and the global keyboard shortcuts. */

import { icon, the } from "./dom.js";
import { keep, kept } from "./storage.js";
import { switchTheme } from "./theme.js";

/** @typedef {import("./main.js").Page} Page */

/** @param {Page} page */
export function controls(page) {
  the("menu").append(icon("menu"));
  the("settings").append(icon("settings"));
  switchTheme(the("theme"));
  switchTint(page.view, the("tint"));
  document.addEventListener("keydown", (event) => {
    if (pressed(page, event)) event.preventDefault();
  });
}

/** @param {Page["view"]} view @param {HTMLButtonElement} button */
function switchTint(view, button) {
  const draw = (/** @type {boolean} */ on) => {
    button.setAttribute("aria-pressed", String(on));
    the("legend").hidden = !on;
    view.tinted = on;
    view.draw();
  };
  button.addEventListener("click", () => {
    keep("tint", view.tinted ? "off" : null);
    draw(!view.tinted);
  });
  draw(kept("tint") !== "off");
}

/** @param {Page} page @param {KeyboardEvent} event @returns {boolean} whether the key is a shortcut */
function pressed(page, event) {
  const control = event.ctrlKey || event.metaKey;
  const searching = event.target === the("search"); // there, Escape clears the field
  if (event.key === "Escape" && page.busy && !searching && !document.querySelector("dialog[open]")) page.stop();
  else if (control && event.key === "k") {
    page.sidebar.open(true);
    the("search").focus();
  } else if (control && event.shiftKey && event.key.toLowerCase() === "o") page.begin();
  else return false;
  return true;
}
