/**
 * Markdown to elements, a block at a time: while a text grows, only its last blocks are made again.
 *
 * The one place where text becomes HTML. DOMPurify keeps what is on the list below and drops the rest; the server's
 * Content-Security-Policy lets nothing else do so (trusted types), and loads no picture from elsewhere.
 */

import { copy, icon, make } from "./dom.js";
import DOMPurify from "./vendor/purify.js";
import { Marked } from "./vendor/marked.js";

const SAFE = {
  ALLOWED_TAGS: [
    "p",
    "br",
    "hr",
    "strong",
    "em",
    "del",
    "a",
    "code",
    "pre",
    "blockquote",
    "ul",
    "ol",
    "li",
    "span",
    "sup",
    "sub",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
  ],
  ALLOWED_ATTR: ["href", "title", "class", "start", "align"],
  ADD_URI_SAFE_ATTR: ["start", "align"], // they hold no address, and DOMPurify takes all but a few for one
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

/** @type {any} */
const purify = DOMPurify;

const marked = new Marked({
  gfm: true,
  breaks: true,
  /** @type {Record<string, (token: any) => string>} */
  renderer: {
    html: ({ text }) => escape(text), // a model that writes <b> shows <b>
    image: ({ text, href }) => `<span>${escape(text || href)}</span>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) =>
      `<pre><code class="language-${escape(first(lang))}">${coloured(text, first(lang))}</code></pre>`,
  },
});

/** @type {any} */
let highlighter = null;
/** @type {Promise<void> | null} */
let loading = null;

/** Colours are loaded with the first block of code; resolves when they are there.
 * @returns {Promise<void>} */
function loadHighlighter() {
  loading ??= import("./vendor/highlight.js").then((module) => {
    highlighter = module.default;
  });
  return loading;
}

/** A block of code names its language first, and may say more.
 * @param {string | undefined} info */
function first(info) {
  return (info ?? "").trim().split(/\s/)[0].toLowerCase();
}

/** @param {string} text @param {string} language @returns {string} HTML */
function coloured(text, language) {
  if (!highlighter?.getLanguage(language)) return escape(text);
  return highlighter.highlight(text, { language, ignoreIllegals: true }).value;
}

/** @param {string} text */
function escape(text) {
  return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
}

/** A block of a text: the element, and the characters of the source that it was made of.
 * @typedef {{raw: string, from: number, element: HTMLElement}} Block */

/** A text that is shown as it grows. */
export class Rendered {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    /** @type {Block[]} */
    this.blocks = [];
    this.source = "";
    this.plain = false;
  }

  /** Show this text. Blocks that are as before keep their elements.
   * @param {string} source @param {boolean} [plain] as it is, a line to a block, rather than as markdown
   * @returns {Block[]} those that were made */
  show(source, plain = this.plain) {
    if (plain === this.plain && source === this.source && this.blocks.length) return [];
    if (plain !== this.plain) for (const block of this.blocks.splice(0)) block.element.remove();
    this.plain = plain;
    /** @type {{raw: string}[]} */
    const tokens = plain
      ? source.split(/(?<=\n)/).map((raw) => ({ raw }))
      : marked.lexer(source).filter((/** @type {any} */ t) => t.raw !== "");
    /** @type {Block[]} */
    const made = [];
    let from = 0;
    tokens.forEach((token, i) => {
      const before = this.blocks[i];
      if (before?.raw !== token.raw || before.from !== from) {
        const block = { raw: token.raw, from, element: this.#make(token) };
        if (before) before.element.replaceWith(block.element);
        else this.root.append(block.element);
        this.blocks[i] = block;
        made.push(block);
      }
      from += token.raw.length;
    });
    for (const block of this.blocks.splice(tokens.length)) block.element.remove();
    this.source = source;
    return made;
  }

  /** Make all blocks again. @returns {Block[]} */
  again() {
    for (const block of this.blocks.splice(0)) block.element.remove();
    return this.show(this.source);
  }

  /** @param {any} token @returns {HTMLElement} */
  #make(token) {
    if (this.plain) return make("div", { class: "block plain", dir: "auto" }, token.raw.replace(/\n$/, "") || make("br"));
    const element = make("div", { class: "block", dir: "auto" }, purify.sanitize(marked.parser([token]), SAFE));
    for (const link of element.querySelectorAll("a")) {
      link.target = "_blank";
      link.rel = "noopener noreferrer nofollow";
    }
    for (const table of element.querySelectorAll("table")) {
      const frame = make("div", { class: "wide-table", tabindex: "0", role: "region", "aria-label": "Table" });
      table.replaceWith(frame);
      frame.append(table);
    }
    for (const pre of element.querySelectorAll("pre")) this.#frame(pre);
    return element;
  }

  /** Give a block of code its language's name and a button to copy it.
   * @param {HTMLElement} pre */
  #frame(pre) {
    const code = /** @type {HTMLElement} */ (pre.firstElementChild);
    const language = code.className.replace("language-", "");
    if (language && !highlighter)
      loadHighlighter().then(
        () => this.onload?.(),
        () => {},
      ); // plain, if it cannot come
    const button = make("button", { class: "quiet copy", type: "button" }, icon("copy"), "Copy");
    button.addEventListener("click", () => copy(button, code.textContent ?? ""));
    pre.dir = "ltr";
    pre.tabIndex = 0; // long lines scroll by the arrow keys
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
    const frame = make("div", { class: "code" });
    pre.replaceWith(frame);
    frame.append(make("div", { class: "code-head" }, make("span", { text: language || "text" }), button), pre);
  }

  /** Called when colours have come and all should be made `again`. @type {(() => void) | undefined} */
  onload;
}
