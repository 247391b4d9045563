/**
 * A conversation is a tree of messages: editing or asking again adds a sibling, and nothing is lost.
 *
 *     hello ── Hi!            the path on the screen follows, from the root, the child chosen last
 *           └─ Good day.      under each message
 */

/**
 * A token as it came: its text, the logarithm of its probability, its bytes if its text is not whole characters,
 * and what else was likely there.
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
 * @property {number} [given]       so many characters of the content were given, and no token stands for them
 * @property {Token[]} [tokens]     the rest of it
 * @property {Call[]} [calls]       tools the model wants called
 * @property {{id: string, content: string}[]} [results]   of a "tool" message: what the calls gave
 * @property {"streaming" | "done" | "length" | "stopped" | "cut" | "full" | "failed"} [state]
 * @property {string} [problem]     why it was cut or failed, in words
 * @property {string} [model]
 * @property {{prompt_tokens: number, completion_tokens: number}} [usage]
 * @property {number} [first]       milliseconds until the first token
 * @property {number} [rate]        tokens a second after it
 *
 * @typedef {Object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {number} created
 * @property {number} updated
 * @property {Record<string, string>} chosen   the child chosen under each message; under "" the first message
 * @property {Record<string, any>} settings
 */

const ROOT = "";

/** @returns {string} */
export function newId() {
  // randomUUID is missing where the page is served neither from this machine nor over TLS
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join(
    "",
  );
}

/** Make a record say what another says. @param {any} record @param {any} other */
function replace(record, other) {
  for (const name of Object.keys(record)) if (!(name in other)) delete record[name];
  Object.assign(record, other);
}

/** Its messages, and which of them are on the screen. */
export class Tree {
  /** @param {Conversation} conversation @param {Message[]} [messages] */
  constructor(conversation, messages = []) {
    this.conversation = conversation;
    /** @type {Map<string, Message>} */
    this.messages = new Map();
    /** @type {Map<string, string[]>} */
    this.children = new Map();
    for (const message of [...messages].sort((a, b) => a.created - b.created)) this.#put(message);
    /** Messages that are not kept yet. @type {Set<Message>} */
    this.fresh = new Set();
  }

  /** @param {Message} message */
  #put(message) {
    this.messages.set(message.id, message);
    const key = message.parent ?? ROOT;
    this.children.set(key, [...(this.children.get(key) ?? []), message.id]);
  }

  /** Add a message under another (null: as a first one) and show it.
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
      created: Math.max(Date.now(), latest + 1), // siblings stay in the order they were made
    };
    this.#put(message);
    this.fresh.add(message);
    this.choose(message.id);
    return message;
  }

  /** Take in what another tab kept of this conversation. What is on the screen stays there: the other tab's choice
   * counts only where there was none yet.
   * @param {Conversation} conversation @param {Message[]} messages
   * @param {Message} [writing] is being written in this tab, and what was kept of it is old */
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

  /** The message's parent's children, itself among them.
   * @param {string} id @returns {string[]} */
  siblings(id) {
    return this.children.get(this.get(id).parent ?? ROOT) ?? [];
  }

  /** Show the path that leads through a message.
   * @param {string} id */
  choose(id) {
    for (let at = this.get(id); ; at = this.get(at.parent)) {
      this.conversation.chosen[at.parent ?? ROOT] = at.id;
      if (at.parent === null) return;
    }
  }

  /** Show the sibling that many further on.
   * @param {string} id @param {number} by */
  move(id, by) {
    const siblings = this.siblings(id);
    const to = siblings[siblings.indexOf(id) + by];
    if (to) this.choose(to);
  }

  /** From the first message to the last that is on the screen.
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

  /** From the first message to this one.
   * @param {string | null} id @returns {Message[]} */
  upTo(id) {
    const path = [];
    for (let at = id; at !== null; at = this.get(at).parent) path.unshift(this.get(at));
    return path;
  }
}
