/**
 * LaTeX formulas in Markdown: finds them in the source, and draws them as MathML.
 *
 *     \( a \)   $a$          in a line of text
 *     \[ a \]   $$ a $$      on a line of their own
 *
 * Temml builds DOM nodes, never HTML strings, and its commands for links, images and attributes are disabled.
 */

import { make } from "./dom.js";

/** A formula in the source, with its delimiters; `open` if its end has not arrived yet.
 * @typedef {{raw: string, display: boolean, open: boolean}} Formula */

// A formula contains no blank line, as in LaTeX: a delimiter without its partner affects only its own paragraph.
const LINES = String.raw`(?:(?!\n[ \t]*\n)[^])`;
const PAIRS = /** @type {const} */ ([
  [String.raw`\\\[`, String.raw`\\\]`, true],
  [String.raw`\\\(`, String.raw`\\\)`, false],
  [String.raw`\$\$`, String.raw`\$\$`, true],
]);
const CLOSED = PAIRS.map(([begin, end]) => new RegExp(`^${begin}(${LINES}+?)${end}`));
const OPEN = PAIRS.map(([begin]) => new RegExp(`^${begin}(${LINES}*)$`));

// As in Pandoc: no space inside the dollars, and no digit after the second, so that "$5 and $10" are prices.
const DOLLARS = /^\$(?![\s$])((?:\\[^\n]|[^\\$\n`]){1,300}?)(?<![\s\\])\$(?![\d$])/;
const OPEN_DOLLARS = /^\$(?![\s$\d])[^$\n`]*\\[^$\n`]*$/; // with a backslash, which prices do not have
// Text between the dollars of two prices: two words in a row, or a number and a word without an operator.
const PROSE = /(?<![\\A-Za-z])[A-Za-z]{2,} [A-Za-z]{2,}|^\d[^\\^_={}+*/<>|]*\s/;

let whole = "";
let inCode = 0; // characters at the end that follow a backtick without its partner: perhaps code

/** Set the text that is rendered next. Only at its end can formulas and code still be incomplete.
 * @param {string} source */
export function beginText(source) {
  whole = source.trimEnd();
  const tail = whole.slice(whole.lastIndexOf("\n\n") + 1);
  const ticks = [...tail.matchAll(/(?<!`)`{1,2}(?!`)/g)];
  inCode = ticks.length % 2 ? tail.length - (ticks.at(-1)?.index ?? 0) : 0;
}

/** The formula at the start of a text, or null.
 * @param {string} source @returns {Formula | null} */
export function formulaAt(source) {
  const rest = source.trimEnd();
  if (rest.length < inCode && whole.endsWith(rest)) return null;
  for (const [i, [, , display]] of PAIRS.entries()) {
    const closed = CLOSED[i].exec(source);
    if (closed?.[1].trim()) return { raw: closed[0], display, open: false };
    const open = OPEN[i].exec(source);
    if (open && whole.endsWith(open[0].trimEnd())) return { raw: open[0], display, open: true };
  }
  const open = OPEN_DOLLARS.exec(source);
  if (open && whole.endsWith(open[0].trimEnd())) return { raw: open[0], display: false, open: true };
  const dollars = DOLLARS.exec(source);
  if (!dollars || PROSE.test(dollars[1].replace(/\\(?:text|mathrm|operatorname)\{[^}]*\}/g, ""))) return null;
  return { raw: dollars[0], display: false, open: false };
}

/** The offset of the next possible formula. @param {string} source */
function next(source) {
  const at = source.search(/\\[([]|(?<![\w\\$])\$/);
  return at < 0 ? undefined : at;
}

/** @param {Formula} formula @returns {string} HTML: a placeholder, which `drawFormulas` replaces */
function placeholder({ raw, display, open }) {
  const kind = open ? "formula open" : display ? "formula display" : "formula";
  return `<span class="${kind}">${raw.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`)}</span>`;
}

const BLOCK = /^ {0,3}(?=\\\[|\$\$)/;

/** Extension of marked: formulas in text, and as blocks, whose lines may begin as list items do. */
export const FORMULAS = {
  extensions: [
    {
      name: "formulaBlock",
      level: "block",
      /** @param {string} source */
      start(source) {
        const at = source.search(/^ {0,3}(?:\\\[|\$\$)/m);
        return at >= 0 && block(source.slice(at)) ? at : undefined;
      },
      /** @param {string} source */
      tokenizer: (source) => block(source) ?? undefined,
      renderer: (/** @type {any} */ token) => `<p>${placeholder(token.formula)}</p>`,
    },
    {
      name: "formula",
      level: "inline",
      start: next,
      /** @param {string} source */
      tokenizer(source) {
        const formula = formulaAt(source);
        return formula ? { type: "formula", ...formula } : undefined;
      },
      renderer: placeholder,
    },
  ],
  hooks: {
    /** Hide formulas from the search for emphasis: a_1 and b_1 in two formulas are no pair.
     * @param {string} source */
    emStrongMask(source) {
      let masked = "";
      for (let rest = source; rest;) {
        const at = next(rest) ?? rest.length;
        const formula = formulaAt(rest.slice(at));
        const to = at + (formula?.raw.length ?? 1);
        masked += rest.slice(0, at) + (formula ? "a".repeat(formula.raw.length) : rest.slice(at, to));
        rest = rest.slice(to);
      }
      return masked;
    },
  },
};

/** A formula alone on its lines. @param {string} source */
function block(source) {
  const indent = BLOCK.exec(source)?.[0];
  if (indent === undefined) return null;
  const formula = formulaAt(source.slice(indent.length));
  if (!formula?.display) return null;
  const after = /^([.,;:]?)[ \t]*(?:\n|$)/.exec(source.slice(indent.length + formula.raw.length));
  if (!after) return null; // text follows on the line
  const raw = indent + formula.raw + after[0];
  return { type: "formulaBlock", raw, formula: { ...formula, raw: formula.raw + after[1] } };
}

/** @type {any} */
let temml = null;
/** @type {Promise<void> | null} */
let loading = null;
/** Drawn formulas by source. A growing paragraph draws its formulas again. @type {Map<string, Element | null>} */
const drawn = new Map();
const MOST = 500; // formulas that are kept

/** Load Temml, with the first formula.
 * @returns {Promise<void>} */
function load() {
  loading ??= import("./vendor/temml.js").then((module) => {
    temml = module.default;
  });
  return loading;
}

/** Replace the placeholders in an element by formulas. Incomplete and invalid ones stay as source text.
 * @param {HTMLElement} root
 * @param {() => void} loaded called when Temml has loaded and `root` can be drawn again */
export function drawFormulas(root, loaded) {
  for (const span of /** @type {NodeListOf<HTMLElement>} */ (root.querySelectorAll("span.formula"))) {
    const raw = span.textContent ?? "";
    if (span.classList.contains("open")) continue;
    if (!temml) {
      load().then(loaded, () => {}); // without Temml, formulas stay as source text
      continue;
    }
    const display = span.classList.contains("display");
    const math = draw(raw, display);
    if (!math) {
      span.classList.add("open");
      span.title = "This formula is not valid LaTeX, or uses a command that is not supported.";
      continue;
    }
    const inner = make("span", { class: "tex", data: { raw } }, math);
    span.replaceChildren(inner);
    if (!display && raw.length < 60) continue;
    span.classList.add("long");
    span.tabIndex = 0; // makes wide formulas scrollable with the arrow keys
    span.setAttribute("role", "group");
    span.setAttribute("aria-label", "Formula");
  }
}

/** @param {string} raw @param {boolean} display @returns {Element | null} */
function draw(raw, display) {
  if (!drawn.has(raw)) {
    if (drawn.size >= MOST) drawn.clear();
    drawn.set(
      raw,
      build(raw.replace(/^(?:\\[[(]|\$\$?)/, "").replace(/(?:\\[\])]|\$\$?)([.,;:]?)$/, "$1"), display),
    );
  }
  return /** @type {Element | null} */ (drawn.get(raw)?.cloneNode(true) ?? null);
}

const HOW = { trust: false, strict: false, throwOnError: true, maxSize: [20, 1000], maxExpand: 500 };

/** @param {string} tex @param {boolean} display @returns {Element | null} */
function build(tex, display) {
  try {
    const tree = temml.__renderToMathMLTree(tex, { ...HOW, macros: {}, displayMode: display });
    clean(tree);
    return tree.toNode();
  } catch {
    return null;
  }
}

/** Remove the attributes that a formula must not set: ids (of \label), and styles, which the policy blocks.
 * Throws an Error for links (\ref) and images.
 * @param {any} node of Temml's tree */
function clean(node) {
  if (node.href !== undefined || node.src !== undefined) throw new Error("links and images are not supported");
  for (const name of ["id", "href", "src", "style"]) delete node.attributes?.[name];
  for (const child of node.children ?? []) clean(child);
}
