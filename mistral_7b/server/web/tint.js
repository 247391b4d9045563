/**
 * Maps tokens to the characters of an answer, and tints them by probability.
 *
 * Rendered Markdown has no markup, so each piece of a block's text is searched in its source, from left to right. A
 * formula is tinted as a whole.
 *
 *     source     so **very** good         tokens   "so" " **" "very" "**" " good"
 *     rendered   so very good             tinted   "so" " "   "very"      " good"
 */

import { make } from "./dom.js";

/** @typedef {import("./tree.js").Message} Message @typedef {import("./tree.js").Token} Token */

/** The lowest probability of each tint, from t0 on; answer.css sets the colors of t0 to t5. */
const LEVELS = [0.9, 0.7, 0.45, 0.25, 0.1];

/** @param {number} logprob @returns {number} the tint, 0 (likely) to 5 (unlikely) */
export function level(logprob) {
  const p = Math.exp(logprob);
  const at = LEVELS.findIndex((low) => p >= low);
  return at < 0 ? LEVELS.length : at;
}

/** The offsets of the tokens in the content, in characters: the start of the first one, then the end of each. A token
 * without visible text (a part of a character, the end of the answer) ends where the previous one does.
 * @param {Message} message
 * @returns {number[]} */
export function place(message) {
  const { content, tokens = [] } = message;
  let at = message.given ?? 0;
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // invalid bytes become U+FFFD, as in the content
  const ends = [at];
  for (const token of tokens) {
    const bytes = token.b ? new Uint8Array(token.b) : new TextEncoder().encode(token.t);
    const text = decoder.decode(bytes, { stream: true });
    at += shown(content, at, text);
    ends.push(at);
  }
  return ends;
}

/** The number of characters of the content at an offset that a token's text covers.
 * @param {string} content @param {number} at @param {string} text */
function shown(content, at, text) {
  if (content.startsWith(text, at)) return text.length;
  if (text.startsWith(" ") && content.startsWith(text.slice(1), at)) return text.length - 1; // first space
  let same = 0; // a stop string may have cut the token
  while (same < text.length && content[at + same] === text[same]) same++;
  if (at + same === content.length) return same;
  const near = content.indexOf(text, at); // resynchronize: a character was lost with a connection
  return text && near >= 0 && near - at <= 16 ? near - at + text.length : 0;
}

/** Wrap the text of each token of a block in a span.
 * @param {import("./markdown.js").Block} block @param {Token[]} tokens @param {number[]} ends */
export function tint(block, tokens, ends) {
  const walker = document.createTreeWalker(block.element, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
  /** @type {(Text | HTMLElement)[]} */
  const nodes = [];
  while (walker.nextNode()) {
    const node = /** @type {any} */ (walker.currentNode);
    const inFormula = node.parentElement?.closest(".tex");
    if (node.nodeType === Node.TEXT_NODE ? !inFormula : node.classList.contains("tex")) nodes.push(node);
  }
  let at = 0;
  for (const node of nodes) {
    if (node instanceof HTMLElement) {
      at = tintFormula(node, block, at, tokens, ends);
      continue;
    }
    if (
      node.parentElement?.closest(".code-head") ||
      (!node.data.trim() && !node.parentElement?.closest("pre, .plain"))
    )
      continue;
    /** @type {(Node | string)[]} */
    const parts = [];
    for (const line of block.raw.includes(node.data, at) ? [node.data] : node.data.split(/(?<=\n)/)) {
      const found = block.raw.indexOf(line.trimEnd(), at); // trailing whitespace may be rendered differently
      if (found < 0) {
        // the source differs, as for &amp;
        parts.push(line);
        continue;
      }
      parts.push(...spans(line, block.from + found, tokens, ends));
      at = found + line.trimEnd().length;
    }
    node.replaceWith(...parts);
  }
}

/** Tint a formula as its least likely token, whose alternatives it shows.
 * @param {HTMLElement} formula @param {import("./markdown.js").Block} block
 * @param {number} at offset in the block's source @param {Token[]} tokens @param {number[]} ends
 * @returns {number} the offset of the formula's end */
function tintFormula(formula, block, at, tokens, ends) {
  const raw = formula.dataset.raw ?? "";
  const found = block.raw.indexOf(raw, at);
  if (found < 0) return at;
  const from = block.from + found;
  let least = -1;
  for (let i = first(ends, from); i < tokens.length && ends[i] < from + raw.length; i++) {
    if (ends[i + 1] > from && (least < 0 || tokens[i].p < tokens[least].p)) least = i;
  }
  if (least >= 0) {
    formula.classList.add("tok", `t${level(tokens[least].p)}`);
    formula.dataset.i = String(least);
  }
  return found + raw.length;
}

/** @param {string} text @param {number} from its offset in the source
 * @param {Token[]} tokens @param {number[]} ends
 * @returns {(Node | string)[]} */
function spans(text, from, tokens, ends) {
  const parts = [];
  let i = first(ends, from);
  let at = from;
  if (ends[0] > at) {
    // characters without tokens have no tint
    parts.push(text.slice(0, ends[0] - from));
    at = Math.min(ends[0], from + text.length);
  }
  for (; at < from + text.length && i < tokens.length; i++) {
    if (ends[i + 1] <= at) continue;
    const to = Math.min(ends[i + 1], from + text.length);
    const piece = text.slice(at - from, to - from);
    parts.push(make("span", { class: `tok t${level(tokens[i].p)}`, data: { i }, text: piece }));
    at = to;
  }
  if (at < from + text.length) parts.push(text.slice(at - from));
  return parts;
}

/** The index of the first token that ends after an offset.
 * @param {number[]} ends @param {number} at */
function first(ends, at) {
  let [low, high] = [0, ends.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle + 1] > at) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** The beginning of an answer in which an alternative replaces a token: its text and tokens.
 * @param {Message} message @param {number} i the token @param {number} k the alternative
 * @returns {{content: string, tokens: Token[], given: number}} */
export function branch(message, i, k) {
  const tokens = message.tokens ?? [];
  const other = /** @type {Token} */ (tokens[i].a?.[k]);
  const ends = place(message);
  const before = tokens.slice(0, i);
  let start = ends[i];
  let text = other.t;
  if (other.b) {
    // decode it together with the preceding bytes of an incomplete character
    let open = i;
    while (open > 0 && tokens[open - 1].b && ends[open] === ends[open - 1]) open--;
    const bytes = [...tokens.slice(open, i).flatMap((t) => t.b ?? []), ...other.b];
    text = new TextDecoder().decode(new Uint8Array(bytes)).replace(/\ufffd+$/, "");
    start = ends[open];
  }
  if (start === 0 && tokens[0].t.startsWith(" ") && !message.content.startsWith(" "))
    text = text.replace(/^ /, "");
  return {
    content: message.content.slice(0, start) + text,
    tokens: [...before, { ...other, a: tokens[i].a }],
    given: message.given ?? 0,
  };
}
