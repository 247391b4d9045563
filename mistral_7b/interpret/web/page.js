"use strict";
// Shared by all pictures. A view defines `view(main, data)`, which fills the page.

const $ = (id) => document.getElementById(id);

/** An element with attributes ("class", "aria-label"...), listeners ("onclick"...) and children: nodes or text. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** A token's text with its white space made visible. */
const shown = (text) => text.replace(/\r/g, "␍").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (s) => "·".repeat(s.length)).replace(/(?! )[\p{C}\p{Z}\ufffd]/gu, (c) => `<U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`) || "∅";
const quoted = (text) => `“${shown(text)}”`;
const percent = (p) => (p >= 0.9995 ? "100%" : p >= 0.0995 ? `${(100 * p).toFixed(1)}%` : p >= 0.0001 ? `${(100 * p).toFixed(2)}%` : p > 0 ? "<0.01%" : "0%");
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

/** The binary part of this name: base64 of deflate, as Uint8Array. */
async function part(name) {
  const bytes = Uint8Array.from(atob($(`part-${name}`).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** A table of values. Columns are [title, "name" for text]; cells are text. */
function table(caption, columns, rows) {
  const kind = columns.map(([, kind]) => kind || null);
  const head = columns.map(([title, kind]) => el("th", { scope: "col", class: kind || null }, title));
  const body = rows.map((row) => el("tr", {}, ...row.map((cell, i) => i ? el("td", { class: kind[i] }, cell) : el("th", { scope: "row", class: kind[0] }, cell))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body)));
}

/** A closed section whose contents are made when it is opened. */
function later(title, make) {
  const node = el("details", { ontoggle: () => { if (node.open && node.children.length === 1) node.append(make()); } }, el("summary", {}, title));
  return node;
}

/** The tokens as a text: one is in the tab order, arrows move to its neighbors. `choose(i)` is called for a token. */
function tokenText(tokens, choose, label) {
  let current = 0;
  const line = (text) => (/\n/.test(text) ? [el("span", { class: "mark" }, shown(text)), "\n"] : [text === "" ? "∅" : text]);
  const spans = tokens.map((text, i) => el("span", { class: "tok", role: "option", tabindex: "-1", "data-i": i, "aria-label": `${i}: ${shown(text)}`, "aria-selected": "false" }, ...line(text)));
  const node = el("div", { class: "text", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" }, ...spans);
  const go = (i, focus) => {
    spans[current].tabIndex = -1; spans[current].classList.remove("current"); spans[current].setAttribute("aria-selected", "false");
    current = clamp(i, 0, spans.length - 1);
    const span = spans[current];
    span.tabIndex = 0; span.classList.add("current"); span.setAttribute("aria-selected", "true");
    if (focus) span.focus({ preventScroll: true });
    node.scrollTop = clamp(node.scrollTop, span.offsetTop - node.offsetTop - node.clientHeight + 60, Math.max(0, span.offsetTop - node.offsetTop - 40));
  };
  const pick = (event, act) => { const span = event.target.closest(".tok"); if (span) act(Number(span.dataset.i)); };
  node.addEventListener("click", (event) => pick(event, (i) => { go(i, true); choose(i); }));
  node.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -spans.length, End: spans.length }[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault(); go(current + step, true); choose(current);
  });
  const tint = (i, amount, tone) => { spans[i].style.setProperty("--tint", (45 * clamp(amount, 0, 1)).toFixed(1)); if (tone) spans[i].style.setProperty("--tone", `var(--${tone})`); };
  go(0, false);
  return { node, go, tint, spans };
}

/** The color of a CSS variable in the current scheme, as [r, g, b]. */
function color(name) {
  const probe = el("i", { style: { color: `var(--${name})` }, hidden: true });
  document.body.append(probe);
  const numbers = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return numbers;
}

function start() {
  const data = JSON.parse($("data").textContent);
  $("about").textContent = data.about;
  view($("view"), data);
}
