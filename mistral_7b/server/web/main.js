/** The page: what is on the screen, and what its buttons do. */

import { Composer } from "./composer.js";
import { controls } from "./controls.js";
import { ConversationView } from "./conversation.js";
import { say, the } from "./dom.js";
import { Picker } from "./models.js";
import { Panel } from "./panel.js";
import { faults, texts } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { keep, kept, Store } from "./storage.js";
import { Tabs } from "./tabs.js";
import { branch } from "./tint.js";
import { exportAll, readExport } from "./transfer.js";
import { newId, Tree } from "./tree.js";
import { Trouble } from "./trouble.js";
import { keepTree, Writer } from "./writer.js";

/** @typedef {import("./tree.js").Conversation} Conversation @typedef {import("./tree.js").Message} Message */

export class Page {
  /** @param {Awaited<ReturnType<typeof Store.open>>} store */
  constructor(store) {
    this.store = store;
    /** @type {Conversation[]} */
    this.conversations = [];
    /** @type {Tree | null} */
    this.tree = null;
    this.picker = new Picker();
    this.trouble = new Trouble(this.picker);
    this.writer = new Writer(store, {
      changed: (tree, ended) => this.changed(tree, ended),
      trouble: (problem, again) => this.trouble.meet(problem, again),
      model: () => this.picker.chosen,
    });
    this.view = new ConversationView({
      move: (id, by) => this.change((tree) => tree.move(id, by)),
      edit: (id, text) => this.edit(id, text),
      again: (id) => this.withTree((tree) => this.writer.ask(tree, tree.get(id).parent)),
      goOn: (id) => this.withTree((tree) => this.writer.write(tree, tree.get(id))),
      retry: (id) => this.withTree((tree) => this.writer.write(tree, tree.get(id))),
      results: (id, results) =>
        this.withTree((tree) => this.writer.ask(tree, tree.add(id, { role: "tool", results }).id)),
      branch: async (id, i, k) => {
        await this.stop(); // a token may be chosen while more are coming
        this.withTree((tree) => this.writer.ask(tree, tree.get(id).parent, branch(tree.get(id), i, k)));
      },
    });
    this.sidebar = new Sidebar({
      open: (id, message) => this.open(id, message),
      begin: () => this.begin(),
      save: (id) => this.export(id),
      load: (file) => this.import(file),
      search: (query) => store.search(query, this.conversations),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
    });
    this.composer = new Composer({
      send: (text) => this.send(text),
      stop: () => this.stop(),
      editLast: () => this.view.editLast(),
    });
    this.tabs = new Tabs(this);
    this.panel = new Panel(the("panel"), the("settings"), (settings) => this.set(settings));
    controls(this);
  }

  /** Show what the browser kept, and ask the server what it has. */
  async start() {
    this.conversations = await this.store.conversations();
    const wanted = location.hash.slice(1);
    if (this.conversations.some((c) => c.id === wanted)) await this.open(wanted);
    else this.begin();
    await this.trouble.connect();
  }

  /** An answer is being written in the conversation on the screen, by this tab or another. */
  get busy() {
    const { tree } = this;
    return this.writer.busy(tree?.conversation.id) || Boolean(tree?.path().some((m) => m.state === "streaming"));
  }

  async stop() {
    const { id } = this.tree?.conversation ?? { id: "" };
    if (this.writer.busy(id)) return this.writer.stop(id);
    if (!this.busy) return;
    this.tabs.tell("stop", id);
    await this.tabs.settle(id);
  }

  // ------------------------------------------------------------------ which conversation

  /** An empty conversation, which is kept once something is said in it. */
  begin() {
    const settings = texts(kept("settings"));
    const now = Date.now();
    this.tree = new Tree({ id: newId(), title: "", created: now, updated: now, chosen: {}, settings });
    this.#opened();
    this.composer.focus();
  }

  /** @param {string} id @param {string} [message] to be shown, on whatever branch it is */
  async open(id, message) {
    const conversation = this.conversations.find((c) => c.id === id);
    if (!conversation) return;
    const running = this.writer.running.get(id);
    this.tree = running?.tree ?? new Tree(conversation, await this.store.messages(id));
    if (message && this.tree.messages.has(message)) this.tree.choose(message);
    this.#opened();
    if (message) this.view.point(message);
    await this.tabs.settle(id);
  }

  #opened() {
    const { conversation } = /** @type {Tree} */ (this.tree);
    const there = this.conversations.includes(conversation);
    history.replaceState(null, "", there ? `#${conversation.id}` : location.pathname);
    this.panel.show(conversation.settings);
    this.sidebar.leave();
    this.refresh();
  }

  /** Draw all that depends on the conversation. */
  refresh() {
    const id = this.tree?.conversation.id ?? "";
    this.conversations.sort((a, b) => b.updated - a.updated);
    this.view.show(this.tree, !this.busy);
    this.composer.show(this.busy);
    this.sidebar.show(this.conversations, id);
    this.picker.gauge(this.tree?.path() ?? []);
    const { title } = this.tree?.conversation ?? {};
    document.title = title ? `${title} · Mistral 7B` : "Mistral 7B";
  }

  // ------------------------------------------------------------------ writing

  /** @param {import("./tree.js").Tree} tree @param {boolean} ended */
  changed(tree, ended) {
    const { conversation } = tree;
    if (this.store.gone.has(conversation.id)) return;
    if (!this.conversations.includes(conversation)) {
      this.conversations.unshift(conversation);
      history.replaceState(null, "", `#${conversation.id}`);
    }
    if (tree !== this.tree)
      return ended ? this.sidebar.show(this.conversations, this.tree?.conversation.id ?? "") : undefined;
    if (ended || this.view.idle)
      this.refresh(); // it begins or ends
    else this.view.drawSoon();
  }

  /** Do something that has an answer written, unless one is being written or the settings are at fault.
   * @param {(tree: Tree) => unknown} deed @returns {boolean} whether it was done */
  withTree(deed) {
    const { tree } = this;
    if (!tree || this.busy) return false;
    const [wrong] = faults(tree.conversation.settings);
    if (wrong) {
      this.trouble.banner.show("failed", `The settings: ${wrong}.`, [["Show them", () => this.panel.open(true)]]);
      return false;
    }
    this.trouble.banner.hide();
    this.view.follow = true;
    deed(tree);
    return true;
  }

  /** @param {string} text */
  send(text) {
    return this.withTree((tree) => {
      const user = tree.add(tree.path().at(-1)?.id ?? null, { role: "user", content: text });
      tree.conversation.title ||= text.trim().split("\n")[0].slice(0, 60);
      this.writer.ask(tree, user.id);
    });
  }

  /** A sibling with another text; a person's is answered, the model's is kept as it is.
   * @param {string} id @param {string} text @returns {boolean} whether it was taken */
  edit(id, text) {
    return this.withTree((tree) => {
      const message = tree.get(id);
      if (message.role === "user")
        return this.writer.ask(tree, tree.add(message.parent, { role: "user", content: text }).id);
      tree.add(message.parent, {
        role: "assistant",
        content: text,
        given: text.length,
        state: "done",
        model: message.model,
      });
      return this.change(() => {});
    });
  }

  /** Change the tree, and keep it.
   * @param {(tree: Tree) => void} deed */
  async change(deed) {
    const { tree } = this;
    if (!tree) return;
    deed(tree);
    this.view.follow = false;
    this.refresh();
    await keepTree(this.store, tree);
  }

  /** @param {Record<string, string>} settings */
  set(settings) {
    if (!this.tree) return;
    const { conversation } = this.tree;
    conversation.settings = settings;
    this.view.draw();
    keep("settings", JSON.stringify(settings));
    if (this.conversations.includes(conversation)) this.store.save(conversation).catch(() => {}); // kept at the next message
  }

  // ------------------------------------------------------------------ the list

  /** @param {string} id @param {string} title */
  async rename(id, title) {
    const conversation = this.conversations.find((c) => c.id === id);
    if (!conversation) return;
    conversation.title = title;
    this.refresh();
    await this.store.save(conversation);
  }

  /** @param {string} id */
  async remove(id) {
    await this.store.remove(id);
    await this.drop(id);
  }

  /** A conversation is gone: from the list, and from the screen.
   * @param {string} id @param {boolean} [elsewhere] another tab deleted it */
  async drop(id, elsewhere = false) {
    this.store.gone.add(id);
    await this.writer.stop(id);
    this.conversations = this.conversations.filter((c) => c.id !== id);
    if (this.tree?.conversation.id !== id) return this.refresh();
    this.begin();
    if (elsewhere) this.note("found", "This conversation was deleted in another tab.");
  }

  /** @param {"found" | "failed"} kind @param {string} text */
  note(kind, text) {
    this.trouble.banner.show(kind, text, [["Dismiss", () => this.trouble.banner.hide()]]);
  }

  /** @param {string | null} id */
  export(id) {
    return exportAll(
      this.store,
      this.conversations.filter((c) => id === null || c.id === id),
    );
  }

  /** @param {File} file */
  async import(file) {
    try {
      const read = readExport(await file.text());
      for (const { conversation, messages } of read) await this.store.save(conversation, messages);
      this.conversations = [...read.map((r) => r.conversation), ...this.conversations];
      this.refresh();
      say(`${read.length} read`);
      if (read.length) await this.open(read[0].conversation.id);
    } catch (error) {
      this.note("failed", `${file.name} was not read: ${/** @type {Error} */ (error).message}.`);
    }
  }
}

new Page(await Store.open()).start();
