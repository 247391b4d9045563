/** Requests answers and streams them into messages: at most one per conversation, in any number of conversations. */

import { count, Problem } from "./api.js";
import { say } from "./dom.js";
import { requestOf } from "./settings.js";
import { answer } from "./stream.js";

/** @typedef {import("./tree.js").Tree} Tree @typedef {import("./tree.js").Message} Message */

const SAVE_EVERY = 800; // milliseconds of streamed text that a crash may lose

/** Store a conversation with its unsaved and its changed messages.
 * @param {import("./storage.js").Store | import("./storage.js").MemoryStore} store
 * @param {Tree} tree @param {Message[]} [changed] */
export async function keepTree(store, tree, changed = []) {
  const messages = new Set([...tree.fresh, ...changed]);
  await store.save(tree.conversation, [...messages]);
  for (const message of messages) tree.fresh.delete(message);
}

export class Writer {
  /** @param {import("./storage.js").Store | import("./storage.js").MemoryStore} store
   * @param {{changed: (tree: Tree, ended: boolean) => void, trouble: (problem: Problem, again: () => void) => void,
   *   model: () => string, plain: () => boolean, answered: () => void, stored: (error: unknown) => void}} actions
   * `plain` tells whether the model has no chat template; `answered` is called after an answer without problems, `stored` after each attempt to store messages */
  constructor(store, actions) {
    this.store = store;
    this.actions = actions;
    /** @type {Map<string, {tree: Tree, message: Message, controller: AbortController, ended: Promise<void>}>} */
    this.running = new Map();
  }

  /** @param {string | undefined} conversation */
  busy(conversation) {
    return this.running.has(conversation ?? "");
  }

  /** Stop a conversation's answer; resolves when it has stopped and is stored.
   * @param {string} conversation */
  async stop(conversation) {
    const running = this.running.get(conversation);
    running?.controller.abort();
    await running?.ended;
  }

  /** Request a new answer below a message.
   * @param {Tree} tree @param {string | null} parent @param {Partial<Message>} [begun] its beginning */
  ask(tree, parent, begun = {}) {
    return this.write(tree, tree.add(parent, { given: 0, tokens: [], ...begun, role: "assistant" }));
  }

  /** Request an answer, or the continuation of one.
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
    if (!message.content) Object.assign(message, { given: 0, tokens: [], calls: [] }); // drop an incomplete tool call
    delete message.problem;
    delete message.good; // it rated what was there before
    conversation.updated = Date.now();
    this.actions.changed(tree, false);
    const reader = new Reader();
    let saved = Date.now();
    /** @type {Problem | null} */
    let problem = null;
    await this.#keep(tree, message);
    try {
      const path = tree.upTo(message.id);
      const body = requestOf(path, conversation.settings, this.actions.model(), this.actions.plain());
      await this.#answer(message, body, !conversation.settings.max_tokens?.trim(), {
        signal: controller.signal,
        changed: () => {
          reader.heard(message.content, false);
          this.actions.changed(tree, false);
          if (Date.now() - saved < SAVE_EVERY) return;
          saved = Date.now();
          this.store.save(null, [message]).catch(() => {}); // the final save reports errors
        },
      });
    } catch (error) {
      problem = end(message, error);
    }
    reader.heard(message.content, true);
    conversation.updated = Date.now();
    await this.#keep(tree, message);
    this.running.delete(conversation.id); // only after the save: from now on tabs prefer the stored version
    this.actions.changed(tree, true);
    if (problem) this.actions.trouble(problem, () => this.write(tree, message));
    else this.actions.answered();
    if (controller.signal.aborted) this.#count(tree, message);
  }

  /** Store a message. An answer that cannot be stored streams nevertheless.
   * @param {Tree} tree @param {Message} message */
  async #keep(tree, message) {
    try {
      await keepTree(this.store, tree, [message]);
      this.actions.stored(null);
    } catch (error) {
      this.actions.stored(error);
    }
  }

  /** Stream an answer. If the default token limit does not fit into the context, the server uses the rest of it.
   * @param {Message} message @param {Record<string, any>} body @param {boolean} byDefault the limit is the default
   * @param {Parameters<typeof answer>[2]} how */
  async #answer(message, body, byDefault, how) {
    try {
      await answer(message, body, how);
    } catch (error) {
      if (!byDefault || !(error instanceof Problem) || error.kind !== "refused") throw error;
      delete body.max_tokens;
      await answer(message, body, how);
    }
  }

  /** Count the conversation's tokens: the usage of a stopped answer is never sent.
   * @param {Tree} tree @param {Message} message */
  async #count(tree, message) {
    const path = tree.upTo(message.id);
    const { settings } = tree.conversation;
    const { model, prompt, messages, tools } = requestOf(path, settings, this.actions.model(), this.actions.plain());
    const said = message.tokens?.length ?? 0;
    try {
      const continued = Boolean(message.content);
      const all = await count(
        messages ? { model, messages, tools, continue_final_message: continued } : { model, prompt },
      );
      message.usage = { prompt_tokens: Math.max(0, all - said), completion_tokens: said };
      await this.store.save(null, [message]);
      this.actions.changed(tree, true);
    } catch {
      /* the gauge keeps its previous value */
    }
  }
}

/** Set the message's state after an error.
 * @param {Message} message @param {any} error
 * @returns {Problem | null} the problem to report; null for an abort */
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
      ? "The connection was lost during this answer. The part received so far is kept."
      : problem.message;
  return problem;
}

/** Announces a growing answer to screen readers, by whole paragraphs. */
class Reader {
  #read = 0;

  /** @param {string} text @param {boolean} ended */
  heard(text, ended) {
    const to = ended ? text.length : text.lastIndexOf("\n\n");
    if (to > this.#read) {
      say(text.slice(this.#read, to).trim());
      this.#read = to;
    }
    if (ended) say("The answer is complete.");
  }
}
