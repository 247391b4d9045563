/** Full-text search in conversations. */

/** @typedef {import("./tree.js").Conversation} Conversation @typedef {import("./tree.js").Message} Message */

/** A search result. Without `message`, the match is in the title. `around`: the text before the first word's match,
 * the match, and the text after it.
 * @typedef {{message?: string, around?: [string, string, string]}} Find */

const BEFORE = 24; // characters of context before the match, and after it
const AFTER = 60;

export class Seeker {
  /** @param {string} query @param {Conversation[]} conversations */
  constructor(query, conversations) {
    this.words = query.toLowerCase().split(/\s+/).filter(Boolean);
    /** @type {Map<string, Find>} */
    this.found = new Map(conversations.filter((c) => this.#fits(c.title)).map((c) => [c.id, {}]));
  }

  /** @param {string} text */
  #fits(text) {
    const low = text.toLowerCase();
    return this.words.every((word) => low.includes(word));
  }

  /** @param {Message} message */
  look(message) {
    if (this.found.get(message.conversation)?.message || !this.#fits(message.content)) return;
    this.found.set(message.conversation, { message: message.id, around: this.#around(message.content) });
  }

  /** @param {string} text @returns {[string, string, string]} */
  #around(text) {
    const at = text.toLowerCase().indexOf(this.words[0]);
    const end = at + this.words[0].length;
    const start = at <= BEFORE ? 0 : text.lastIndexOf(" ", at - BEFORE) + 1 || at - BEFORE;
    return [
      (start ? "… " : "") + text.slice(Math.max(start, at - 2 * BEFORE), at),
      text.slice(at, end),
      text.slice(end, end + AFTER),
    ];
  }
}
