/**
 * A conversation as a tree of messages: editing or regenerating adds a sibling, and overwrites nothing.
 *
 *     hello ── Hi!            the visible path starts at the root and follows the child chosen last
 *           └─ Good day.      below each message
 */

/**
 * A token: `t` text, `p` log-probability, `b` bytes unless they are the text's, `a` top-k alternatives.
 * @typedef {{t: string, p: number, b?: number[], a?: {t: string, p: number, b?: number[]}[]}} Token
 *
 * @typedef {{id: string, name: string, arguments: string}} Call
 *
 * @typedef {Object} Message
 * @property {string} id
 * @property {string} conversation
 * @property {string | null} parent
 * @property {"user" | "assistant" | "tool"} role
 * @property {string} content
 * @property {number} created       milliseconds since 1970
 * @property {number} [given]       leading characters of the content that have no tokens
 * @property {Token[]} [tokens]     tokens of the rest of the content
 * @property {Call[]} [calls]       tool calls
 * @property {{id: string, content: string}[]} [results]   results of tool calls, in a "tool" message
 * @property {"streaming" | "done" | "length" | "stopped" | "cut" | "full" | "failed"} [state]
 * @property {string} [problem]     error message of a cut or failed answer
 * @property {string} [model]
 * @property {boolean} [good]       rating of an answer: thumb up or down
 * @property {string} [corrects]    id of the answer that this one is an edited version of
 * @property {{prompt_tokens: number, completion_tokens: number}} [usage]
 * @property {number} [first]       time to first token in milliseconds
 * @property {number} [rate]        tokens per second after the first
 *
 * @typedef {Object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {number} created
 * @property {number} updated
 * @property {Record<string, string>} chosen   id of the chosen child by parent id; "" is the root
 * @property {Record<string, any>} settings
 */

const ROOT = "";

/** @returns {string} */
export function newId() {
  // not crypto.randomUUID, which needs localhost or TLS
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join(
    "",
  );
}

/** Overwrite a record in place with another. @param {any} record @param {any} other */
function replace(record, other) {
  for (const name of Object.keys(record)) if (!(name in other)) delete record[name];
  Object.assign(record, other);
}

/** The messages of a conversation, and the visible path through them. */
export class Tree {
  /** @param {Conversation} conversation @param {Message[]} [messages] */
  constructor(conversation, messages = []) {
    this.conversation = conversation;
    /** @type {Map<string, Message>} */
    this.messages = new Map();
    /** @type {Map<string, string[]>} */
    this.children = new Map();
    for (const message of [...messages].sort((a, b) => a.created - b.created)) this.#put(message);
    /** Messages that are not stored yet. @type {Set<Message>} */
    this.fresh = new Set();
  }

  /** @param {Message} message */
  #put(message) {
    this.messages.set(message.id, message);
    const key = message.parent ?? ROOT;
    this.children.set(key, [...(this.children.get(key) ?? []), message.id]);
  }

  /** Add a message below a parent (null: the root) and show it.
   * @param {string | null} parent
   * @param {Partial<Message> & {role: Message["role"]}} fields
   * @returns {Message} */
  add(parent, fields) {
    const siblings = this.children.get(parent ?? ROOT) ?? [];
    const latest = Math.max(0, ...siblings.map((id) => this.messages.get(id)?.created ?? 0));
    const message = {
      content: "",
      ...fields,
      id: newId(),
      conversation: this.conversation.id,
      parent,
      created: Math.max(Date.now(), latest + 1), // keeps siblings in order of creation
    };
    this.#put(message);
    this.fresh.add(message);
    this.choose(message.id);
    return message;
  }

  /** Merge the data that another tab stored. The visible path does not change: the other tab's choice is used only
   * where this tab has none.
   * @param {Conversation} conversation @param {Message[]} messages
   * @param {Message} [writing] the message that this tab is streaming, whose stored version is outdated */
  join(conversation, messages, writing) {
    Object.assign(this.conversation, conversation, {
      chosen: { ...conversation.chosen, ...this.conversation.chosen },
    });
    for (const message of [...messages].sort((a, b) => a.created - b.created)) {
      const known = this.messages.get(message.id);
      if (!known) this.#put(message);
      else if (known !== writing) replace(known, message);
    }
  }

  /** @param {string} id @returns {Message} */
  get(id) {
    const message = this.messages.get(id);
    if (!message) throw new Error(`no message ${id}`);
    return message;
  }

  /** Ids of all children of the message's parent, itself included.
   * @param {string} id @returns {string[]} */
  siblings(id) {
    return this.children.get(this.get(id).parent ?? ROOT) ?? [];
  }

  /** Make the visible path lead through a message.
   * @param {string} id */
  choose(id) {
    for (let at = this.get(id); ; at = this.get(at.parent)) {
      this.conversation.chosen[at.parent ?? ROOT] = at.id;
      if (at.parent === null) return;
    }
  }

  /** Show the sibling `by` positions after a message.
   * @param {string} id @param {number} by */
  move(id, by) {
    const siblings = this.siblings(id);
    const to = siblings[siblings.indexOf(id) + by];
    if (to) this.choose(to);
  }

  /** The visible path, from the first message to the last.
   * @returns {Message[]} */
  path() {
    const path = [];
    for (let key = ROOT; ;) {
      const children = this.children.get(key) ?? [];
      const chosen = this.conversation.chosen[key];
      const id = children.includes(chosen) ? chosen : children.at(-1);
      if (id === undefined) return path;
      path.push(this.get(id));
      key = id;
    }
  }

  /** The path from the first message to this one.
   * @param {string | null} id @returns {Message[]} */
  upTo(id) {
    const path = [];
    for (let at = id; at !== null; at = this.get(at).parent) path.unshift(this.get(at));
    return path;
  }
}
