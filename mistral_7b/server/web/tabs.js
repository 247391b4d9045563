/**
 * What the tabs of one browser tell each other, so that none shows, or writes over, what another has changed.
 *
 * Messages are records of their own and only the tab that changes one keeps it, so tabs add to one tree; what was
 * added elsewhere is read from the store and joins the tree that is on the screen.
 */

const PATIENCE = 400; // milliseconds within which a tab that writes an answer says so
const QUIET = 2000; // milliseconds without news of such an answer, after which the tab that writes is asked for

/** @typedef {"changed" | "removed" | "stop" | "who" | "here"} What
 * `stop`: whoever writes there shall stop; `who` asks for one that does, which says `here`. All are about one
 * conversation. */

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

  /** @param {What} what @param {string} id of a conversation @param {boolean} [listed] its record has changed too */
  tell(what, id, listed = false) {
    this.channel?.postMessage({ what, id, listed });
  }

  /** @param {{what: What, id: string, listed: boolean}} told */
  #hear({ what, id, listed }) {
    const { writer } = this.page;
    if (what === "who" && writer.busy(id)) this.tell("here", id);
    else if (what === "here") this.asking.get(id)?.();
    else if (what === "stop") writer.stop(id);
    else if (what === "changed") this.#changed(id, listed);
    else if (what === "removed") this.page.drop(id, true);
  }

  /** @param {string} id @param {boolean} listed */
  async #changed(id, listed) {
    const { page } = this;
    const open = () => (page.tree?.conversation.id === id ? page.tree : page.writer.running.get(id)?.tree);
    if (!open() && !listed) return; // more of an answer that is not on the screen
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

  /** A tab that is closed, or breaks, says nothing: if no more comes of an answer on the screen, ask. */
  #watch() {
    clearTimeout(this.watching);
    this.watching = setTimeout(() => this.settle(this.page.tree?.conversation.id ?? ""), QUIET);
  }

  /** An answer that no tab writes any more was cut.
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
      message.problem = "The page was closed while this was being written.";
    }
    page.refresh();
  }

  /** Whether another tab has an answer written in this conversation.
   * @param {string} id @returns {Promise<boolean>} */
  async #writes(id) {
    if (!this.channel) return false;
    const said = new Promise((/** @type {(here: boolean) => void} */ resolve) => {
      this.asking.set(id, () => resolve(true));
      setTimeout(resolve, PATIENCE, false);
    });
    this.tell("who", id);
    const here = await said;
    this.asking.delete(id);
    return here;
  }
}
