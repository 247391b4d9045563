/** Creates DOM elements. Only markdown.js turns text into HTML. */

/** The element of index.html with this id.
 * @param {string} id
 * @returns {any} */
export function the(id) {
  return document.getElementById(id);
}

/** Create an element. `on...` adds a listener; `class`, `text` and `data` set the class, text and dataset; other
 * names are attributes: true sets an empty one, null or false omits it.
 * @param {string} tag
 * @param {Record<string, any>} [how]
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {any} */
export function make(tag, how = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(how)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child) element.append(child);
  return element;
}

/** SVG paths of the icons, in a view box of 24 by 24. */
const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  settings: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5v5M8 13.5v5",
  sun: "M12 8.2a3.8 3.8 0 1 0 0 7.6 3.8 3.8 0 0 0 0-7.6M12 2.8v2M12 19.2v2M2.8 12h2M19.2 12h2M5.5 5.5l1.4 1.4M17.1 17.1l1.4 1.4M5.5 18.5l1.4-1.4M17.1 6.9l1.4-1.4",
  moon: "M20 14.2A8.2 8.2 0 0 1 9.8 4a8.2 8.2 0 1 0 10.2 10.2z",
  send: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  stop: "M7.5 7.5h9v9h-9z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M5 19h3.5L19 8.5 15.5 5 5 15.5zM13.5 7l3.5 3.5",
  good: "M7 11v9H4v-9zl4-8a2.2 2.2 0 0 1 2.2 2.2V9h5a2 2 0 0 1 2 2.3l-1.1 6.9a2 2 0 0 1-2 1.8H7",
  bad: "M7 13V4H4v9zl4 8a2.2 2.2 0 0 0 2.2-2.2V15h5a2 2 0 0 0 2-2.3l-1.1-6.9a2 2 0 0 0-2-1.8H7",
  again: "M19 12a7 7 0 1 1-2.1-5M19.5 4v4h-4",
  resume: "M5 12h13M13 6.5l5.5 5.5-5.5 5.5",
  back: "M14.5 6l-6 6 6 6",
  forth: "M9.5 6l6 6-6 6",
  close: "M6 6l12 12M18 6L6 18",
  bin: "M5 7.5h14M9.5 7V5h5v2M7 7.5l.8 12h8.4l.8-12",
  clip: "M18.5 11.5l-7 7a4.2 4.2 0 0 1-6-6l7.5-7.5a2.8 2.8 0 0 1 4 4l-7.3 7.3a1.4 1.4 0 0 1-2-2l6.8-6.8",
  save: "M12 4v11M7 10.5l5 5 5-5M5 20h14",
  tool: "M14.5 6.5a4 4 0 0 1 5 5l-2.6-.7-1.7-1.7zM15 9.6L6 18.6",
};

/** @param {keyof typeof ICONS} name
 * @returns {SVGSVGElement} */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Create a button with an icon, and a label as its tooltip and accessible name.
 * @param {keyof typeof ICONS} name
 * @param {string} label
 * @param {(event: Event) => void} onclick
 * @param {Record<string, any>} [how]
 * @returns {HTMLButtonElement} */
export function iconButton(name, label, onclick, how = {}) {
  return make(
    "button",
    { class: "icon", type: "button", "aria-label": label, title: label, onclick, ...how },
    icon(name),
  );
}

/** Copy text to the clipboard, and show the outcome on the button for a moment.
 * @param {HTMLButtonElement} button
 * @param {string} text */
export async function copy(button, text) {
  const before = [...button.childNodes];
  const plain = button.textContent;
  try {
    await toClipboard(text);
    button.replaceChildren(icon("check"), plain ? "Copied" : "");
    say("Copied");
  } catch {
    button.replaceChildren(plain ? "Select the text and press Ctrl+C" : icon("close"));
    say("The browser does not allow the page to copy");
  }
  setTimeout(() => button.replaceChildren(...before), 1600);
}

/** Copy with the clipboard API, which needs localhost or TLS, or else with the deprecated execCommand.
 * @param {string} text */
async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { class: "unseen", readonly: true });
  area.value = text;
  const before = /** @type {HTMLElement | null} */ (document.activeElement);
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!done) throw new Error("not copied");
}

/** Announce a text to screen readers.
 * @param {string} text */
export function say(text) {
  const line = make("p", { text });
  the("said").append(line);
  setTimeout(() => line.remove(), 20_000);
}

/** Ask the user to confirm an action that cannot be undone.
 * @param {string} title @param {string} why @param {string} yes
 * @returns {Promise<boolean>} */
export function confirmed(title, why, yes) {
  const dialog = the("confirm-dialog");
  the("confirm-title").textContent = title;
  the("confirm-why").textContent = why;
  the("confirm-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
  });
}
