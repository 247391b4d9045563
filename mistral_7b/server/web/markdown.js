/**
 * Renders Markdown block by block: while a text grows, only its last blocks are rendered again.
 *
 * The only module that turns text into HTML, in which formulas.js replaces placeholders by MathML. DOMPurify keeps
 * the tags and attributes listed below; the server's Content-Security-Policy allows no other code to create HTML
 * (trusted types), and no images of other origins.
 */

import { copy, icon, make } from "./dom.js";
import { beginText, drawFormulas, FORMULAS } from "./formulas.js";
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
  ADD_URI_SAFE_ATTR: ["start", "align"], // no URIs, although DOMPurify treats them as such by default
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const BELOW = 2; // an answer's headings rank below the page's own h1 and h2

/** @type {any} */
const purify = DOMPurify;

const marked = new Marked({
  gfm: true,
  breaks: true,
  /** @type {Record<string, (token: any) => string>} */
  renderer: {
    html: ({ text }) => escape(text), // HTML from the model is shown as text
    image: ({ text, href }) => `<span>${escape(text || href)}</span>`,
    heading({ depth, tokens }) {
      const rank = Math.min(depth + BELOW, 6);
      return `<h${rank}>${/** @type {any} */ (this).parser.parseInline(tokens)}</h${rank}>`;
    },
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) =>
      `<pre><code class="language-${escape(first(lang))}">${colored(text, first(lang))}</code></pre>`,
  },
});

marked.use(/** @type {any} */ (FORMULAS));

/** @type {any} */
let highlighter = null;
/** @type {Promise<void> | null} */
let loading = null;

/** Load the syntax highlighter, with the first code block that needs it; resolves when it is available.
 * @returns {Promise<void>} */
function loadHighlighter() {
  loading ??= import("./vendor/highlight.js").then((module) => {
    highlighter = module.default;
  });
  return loading;
}

/** The language of a code block: the first word of its info string.
 * @param {string | undefined} info */
function first(info) {
  return (info ?? "").trim().split(/\s/)[0].toLowerCase();
}

/** @param {string} text @param {string} language @returns {string} HTML */
function colored(text, language) {
  if (!highlighter?.getLanguage(language)) return escape(text);
  return highlighter.highlight(text, { language, ignoreIllegals: true }).value;
}

/** @param {string} text */
function escape(text) {
  return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
}

/** A rendered block: its element, its source text, and the offset of that text in characters.
 * @typedef {{raw: string, from: number, element: HTMLElement}} Block */

/** A view of a growing text. */
export class Rendered {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    /** @type {Block[]} */
    this.blocks = [];
    this.source = "";
    this.plain = false;
  }

  /** Show a text. Unchanged blocks keep their elements.
   * @param {string} source @param {boolean} [plain] one block per line, without Markdown
   * @returns {Block[]} the new blocks */
  show(source, plain = this.plain) {
    if (plain === this.plain && source === this.source && this.blocks.length) return [];
    if (plain !== this.plain) for (const block of this.blocks.splice(0)) block.element.remove();
    this.plain = plain;
    beginText(source);
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

  /** Render all blocks again. @returns {Block[]} */
  again() {
    for (const block of this.blocks.splice(0)) block.element.remove();
    return this.show(this.source);
  }

  /** @param {any} token @returns {HTMLElement} */
  #make(token) {
    if (this.plain)
      return make("div", { class: "block plain", dir: "auto" }, token.raw.replace(/\n$/, "") || make("br"));
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
    drawFormulas(element, () => this.onload?.());
    return element;
  }

  /** Add a header to a code block, with its language and a copy button.
   * @param {HTMLElement} pre */
  #frame(pre) {
    const code = /** @type {HTMLElement} */ (pre.firstElementChild);
    const language = code.className.replace("language-", "");
    if (language && !highlighter)
      loadHighlighter().then(
        () => this.onload?.(),
        () => {},
      ); // without the highlighter, the code stays plain
    const button = make("button", { class: "quiet copy", type: "button" }, icon("copy"), "Copy");
    button.addEventListener("click", () => copy(button, code.textContent ?? ""));
    pre.dir = "ltr";
    pre.tabIndex = 0; // makes long lines scrollable with the arrow keys
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
    const frame = make("div", { class: "code" });
    pre.replaceWith(frame);
    frame.append(make("div", { class: "code-head" }, make("span", { text: language || "text" }), button), pre);
  }

  /** Called when the highlighter or Temml has loaded and `again` should run. @type {(() => void) | undefined} */
  onload;
}
