/**
 * Synchronizes the tabs of one browser, so that none shows or overwrites outdated data.
 *
 * Each message is a separate record, saved only by the tab that changes it. Tabs therefore only add to a shared
 * tree: a tab reads the others' additions from the store and joins them to its own tree.
 */

const PATIENCE = 400; // milliseconds that a tab has to reply that it streams an answer
const QUIET = 2000; // milliseconds without an update of a streaming answer, after which its tab is queried

/** @typedef {"changed" | "removed" | "stop" | "query" | "here"} What
 * Messages between tabs, about one conversation. `stop`: stop its answer. `query`: asks which tab streams an answer,
 * which replies `here`. */

export class Tabs {
  /** @param {import("./main.js").Page} page */
  constructor(page) {
    this.page = page;
    this.channel = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel("mistral-7b");
    /** @type {Map<string, () => void>} */
    this.asking = new Map();
    this.watching = 0;
    this.channel?.addEventListener("message", ({ data }) => this.#hear(data));
    page.store.tell = (what, id, listed) => this.tell(what, id, listed);
  }

  /** @param {What} what @param {string} id of a conversation @param {boolean} [listed] its record changed, too */
  tell(what, id, listed = false) {
    this.channel?.postMessage({ what, id, listed });
  }

  /** @param {{what: What, id: string, listed: boolean}} told */
  #hear({ what, id, listed }) {
    const { writer } = this.page;
    if (what === "query" && writer.busy(id)) this.tell("here", id);
    else if (what === "here") this.asking.get(id)?.();
    else if (what === "stop") writer.stop(id);
    else if (what === "changed") this.#changed(id, listed);
    else if (what === "removed") this.page.drop(id, true);
  }

  /** @param {string} id @param {boolean} listed */
  async #changed(id, listed) {
    const { page } = this;
    const open = () => (page.tree?.conversation.id === id ? page.tree : page.writer.running.get(id)?.tree);
    if (!open() && !listed) return; // an update of an answer that is not on the screen
    const conversation = await page.store.conversation(id);
    const messages = open() ? await page.store.messages(id) : [];
    if (!conversation || page.store.gone.has(id)) return;
    const tree = open();
    if (tree) tree.join(conversation, messages, page.writer.running.get(id)?.message);
    else page.conversations = [conversation, ...page.conversations.filter((c) => c.id !== id)];
    if (tree === page.tree && listed) page.panel.follow(conversation.settings);
    if (listed) page.refresh();
    else page.view.drawSoon();
    this.#watch();
  }

  /** Query the streaming tab if updates stop: a tab that was closed or crashed sends no message. */
  #watch() {
    clearTimeout(this.watching);
    this.watching = setTimeout(() => this.settle(this.page.tree?.conversation.id ?? ""), QUIET);
  }

  /** Mark answers that no tab is streaming any more as cut.
   * @param {string} id of a conversation */
  async settle(id) {
    const { page } = this;
    const pending = () =>
      page.tree?.conversation.id === id && !page.writer.busy(id)
        ? [...page.tree.messages.values()].filter((m) => m.state === "streaming")
        : [];
    if (!pending().length) return;
    if (await this.#writes(id)) return this.#watch();
    for (const message of pending()) {
      message.state = message.content ? "cut" : "failed";
      message.problem = "The page was closed before the answer was complete.";
    }
    page.refresh();
  }

  /** Whether another tab is streaming an answer in this conversation.
   * @param {string} id @returns {Promise<boolean>} */
  async #writes(id) {
    if (!this.channel) return false;
    const said = new Promise((/** @type {(here: boolean) => void} */ resolve) => {
      this.asking.set(id, () => resolve(true));
      setTimeout(resolve, PATIENCE, false);
    });
    this.tell("query", id);
    const here = await said;
    this.asking.delete(id);
    return here;
  }
}
