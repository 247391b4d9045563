/** Has answers written: one at a time in a conversation, in any number of conversations at once. */

import { count, Problem } from "./api.js";
import { say } from "./dom.js";
import { requestOf } from "./settings.js";
import { answer } from "./stream.js";

/** @typedef {import("./tree.js").Tree} Tree @typedef {import("./tree.js").Message} Message */

const SAVE_EVERY = 800; // milliseconds: what a crash may lose

/** Keep a conversation, those of its messages that are not kept yet, and others that have changed.
 * @param {import("./storage.js").Store | import("./storage.js").Forgetful} store
 * @param {Tree} tree @param {Message[]} [changed] */
export async function keepTree(store, tree, changed = []) {
  const messages = new Set([...tree.fresh, ...changed]);
  await store.save(tree.conversation, [...messages]);
  for (const message of messages) tree.fresh.delete(message);
}

export class Writer {
  /** @param {import("./storage.js").Store | import("./storage.js").Forgetful} store
   * @param {{changed: (tree: Tree, ended: boolean) => void, trouble: (problem: Problem, again: () => void) => void,
   *   model: () => string}} deeds */
  constructor(store, deeds) {
    this.store = store;
    this.deeds = deeds;
    /** @type {Map<string, {tree: Tree, message: Message, controller: AbortController, ended: Promise<void>}>} */
    this.running = new Map();
  }

  /** @param {string | undefined} conversation */
  busy(conversation) {
    return this.running.has(conversation ?? "");
  }

  /** Resolves when it has stopped, and is kept.
   * @param {string} conversation */
  async stop(conversation) {
    const running = this.running.get(conversation);
    running?.controller.abort();
    await running?.ended;
  }

  /** Have a new answer written under a message.
   * @param {Tree} tree @param {string | null} parent @param {Partial<Message>} [begun] how it begins */
  ask(tree, parent, begun = {}) {
    return this.write(tree, tree.add(parent, { given: 0, tokens: [], ...begun, role: "assistant" }));
  }

  /** Have an answer written, or more of it.
   * @param {Tree} tree @param {Message} message */
  write(tree, message) {
    if (this.busy(tree.conversation.id)) return undefined;
    const controller = new AbortController();
    let over = () => {};
    const ended = new Promise((/** @type {(value: void) => void} */ resolve) => {
      over = resolve;
    });
    this.running.set(tree.conversation.id, { tree, message, controller, ended });
    return this.#write(tree, message, controller).finally(over);
  }

  /** @param {Tree} tree @param {Message} message @param {AbortController} controller */
  async #write(tree, message, controller) {
    const { conversation } = tree;
    message.state = "streaming";
    if (!message.content) Object.assign(message, { given: 0, tokens: [], calls: [] }); // a call may have been half said
    delete message.problem;
    conversation.updated = Date.now();
    this.deeds.changed(tree, false);
    const reader = new Reader();
    let saved = Date.now();
    /** @type {Problem | null} */
    let problem = null;
    try {
      await keepTree(this.store, tree, [message]);
      const body = requestOf(tree.upTo(message.id), conversation.settings, this.deeds.model());
      await answer(message, body, {
        signal: controller.signal,
        changed: () => {
          reader.heard(message.content, false);
          this.deeds.changed(tree, false);
          if (Date.now() - saved < SAVE_EVERY) return;
          saved = Date.now();
          this.store.save(null, [message]).catch(() => {}); // the last save says it
        },
      });
    } catch (error) {
      problem = end(message, error);
    }
    reader.heard(message.content, true);
    conversation.updated = Date.now();
    try {
      await keepTree(this.store, tree, [message]);
    } catch (error) {
      problem ??= new Problem("failed", `This browser could not keep the answer: ${error}`);
    }
    this.running.delete(conversation.id); // not before it is kept: what the store has is taken for newer then
    this.deeds.changed(tree, true);
    if (problem) this.deeds.trouble(problem, () => this.write(tree, message));
    if (controller.signal.aborted) this.#count(tree, message);
  }

  /** A stopped answer's usage has not come: ask how many tokens the conversation has with it.
   * @param {Tree} tree @param {Message} message */
  async #count(tree, message) {
    const { model, messages, tools } = requestOf(tree.upTo(message.id), tree.conversation.settings, this.deeds.model());
    const said = message.tokens?.length ?? 0;
    try {
      const all = await count({ model, messages, tools, continue_final_message: Boolean(message.content) });
      message.usage = { prompt_tokens: Math.max(0, all - said), completion_tokens: said };
      await this.store.save(null, [message]);
      this.deeds.changed(tree, true);
    } catch {
      /* the gauge stays at what was known before */
    }
  }
}

/** Put into the message how it ended; what a person should hear of otherwise comes back.
 * @param {Message} message @param {any} error
 * @returns {Problem | null} */
function end(message, error) {
  if (error?.name === "AbortError") {
    message.state = "stopped";
    return null;
  }
  const problem = error instanceof Problem ? error : new Problem("failed", String(error));
  message.state =
    problem.kind === "full" || problem.kind === "closing" ? "full" : message.content ? "cut" : "failed";
  message.problem =
    problem.kind === "lost" && message.content
      ? "The connection was lost in the middle of this answer. What had come is kept."
      : problem.message;
  return problem;
}

/** Reads a growing answer out: whole paragraphs, when a screen reader is free for them. */
class Reader {
  #read = 0;

  /** @param {string} text @param {boolean} ended */
  heard(text, ended) {
    const to = ended ? text.length : text.lastIndexOf("\n\n");
    if (to > this.#read) {
      say(text.slice(this.#read, to).trim());
      this.#read = to;
    }
    if (ended) say("The answer has ended.");
  }
}
