/** The page: its state, its views, and the actions of their buttons. */

import { titleOf } from "./attach.js";
import { Composer } from "./composer.js";
import { controls } from "./controls.js";
import { ConversationView } from "./conversation.js";
import { say, the } from "./dom.js";
import { offerExport } from "./export.js";
import { Picker } from "./models.js";
import { Panel } from "./panel.js";
import { faults, texts } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { isFull, keep, kept, onKeep, Store } from "./storage.js";
import { Tabs } from "./tabs.js";
import { branch } from "./tint.js";
import { exportAll, readExport } from "./transfer.js";
import { newId, Tree } from "./tree.js";
import { Trouble } from "./trouble.js";
import { Welcome } from "./welcome.js";
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
    this.picker = new Picker(() => this.#modelChanged());
    this.trouble = new Trouble(this.picker);
    this.writer = new Writer(store, {
      changed: (tree, ended) => this.changed(tree, ended),
      trouble: (problem, again) => this.trouble.meet(problem, again),
      model: () => this.picker.chosen,
      plain: () => this.picker.lacksTemplate,
      answered: () => this.trouble.banner.over("full", "lost", "found", "key"),
      stored: (error) => this.#stored(error),
    });
    onKeep((full) => this.trouble.kept(full, () => this.exportAll()));
    const actions = {
      move: (id, by) => this.change((tree) => tree.move(id, by)),
      edit: (id, text) => this.edit(id, text),
      rate: (id, good) => this.rate(id, good),
      again: (id) => this.withTree((tree) => this.writer.ask(tree, tree.get(id).parent)),
      resume: (id) => this.withTree((tree) => this.writer.write(tree, tree.get(id))),
      retry: (id) => this.withTree((tree) => this.writer.write(tree, tree.get(id))),
      results: (id, results) =>
        this.withTree((tree) => this.writer.ask(tree, tree.add(id, { role: "tool", results }).id)),
      branch: async (id, i, k) => {
        await this.stop(); // the answer may still be streaming
        this.withTree((tree) => this.writer.ask(tree, tree.get(id).parent, branch(tree.get(id), i, k)));
      },
    };
    this.view = new ConversationView(actions, (model) => this.picker.plain(model));
    this.sidebar = new Sidebar({
      open: (id, message) => this.open(id, message),
      begin: () => this.begin(),
      save: (id) => offerExport(this.conversations.find((c) => c.id === id)?.title, () => this.#trees(id)),
      load: (file) => this.import(file),
      search: (query) => store.search(query, this.conversations),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
    });
    this.composer = new Composer({
      send: (text) => this.send(text),
      stop: () => this.stop(),
      editLast: () => this.view.editLast(),
      refuse: (problem) => (problem ? this.note("failed", problem) : this.trouble.banner.over("failed")),
    });
    this.welcome = new Welcome(this.picker, (text) => this.composer.use(text));
    this.tabs = new Tabs(this);
    this.panel = new Panel(the("panel"), the("settings"), (settings) => this.set(settings));
    controls(this);
  }

  /** Load the stored conversations, open one, and connect to the server. */
  async start() {
    this.conversations = await this.store.conversations();
    const wanted = location.hash.slice(1);
    if (this.conversations.some((c) => c.id === wanted)) await this.open(wanted);
    else this.begin();
    await this.trouble.connect();
  }

  /** Whether an answer is streaming in the current conversation, in this tab or another. */
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

  // ------------------------------------------------------------------ current conversation

  /** Open an empty conversation. It is stored with its first message. */
  begin() {
    const settings = texts(kept("settings"));
    const now = Date.now();
    this.tree = new Tree({ id: newId(), title: "", created: now, updated: now, chosen: {}, settings });
    this.#opened();
    this.composer.focus();
  }

  /** @param {string} id @param {string} [message] message to show, on any branch */
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

  /** Redraw everything that depends on the current conversation. */
  refresh() {
    const id = this.tree?.conversation.id ?? "";
    this.conversations.sort((a, b) => b.updated - a.updated);
    this.view.show(this.tree, !this.busy);
    this.composer.show(this.busy);
    this.sidebar.show(this.conversations, id);
    this.picker.gauge(this.tree?.path() ?? []);
    const { title } = this.tree?.conversation ?? {};
    the("title").textContent = title || "Conversation";
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
      this.refresh(); // the answer has started or finished
    else this.view.drawSoon();
  }

  /** Run an action that requests an answer, unless an answer is streaming or the settings are invalid.
   * @param {(tree: Tree) => unknown} action @returns {boolean} whether it ran */
  withTree(action) {
    const { tree } = this;
    if (!tree || this.busy) return false;
    const [wrong] = faults(tree.conversation.settings);
    if (wrong) {
      const open = () => this.panel.open(true);
      this.trouble.banner.show("failed", `Invalid settings: ${wrong}.`, [["Open settings", open]]);
      return false;
    }
    this.trouble.banner.hide();
    this.view.follow = true;
    action(tree);
    return true;
  }

  /** @param {string} text */
  send(text) {
    return this.withTree((tree) => {
      const user = tree.add(tree.path().at(-1)?.id ?? null, { role: "user", content: text });
      tree.conversation.title ||= titleOf(text);
      this.writer.ask(tree, user.id);
    });
  }

  /** Add an edited version of a message as a sibling. An edited user message gets a new answer.
   * @param {string} id @param {string} text @returns {boolean} whether the edit was accepted */
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
        calls: message.calls,
        corrects: id,
      });
      return this.change(() => {});
    });
  }

  /** Rate an answer, also while another one is streaming.
   * @param {string} id @param {boolean | undefined} good */
  rate(id, good) {
    const { tree } = this;
    if (!tree) return;
    const message = tree.get(id);
    message.good = good;
    this.view.draw();
    this.#keep(() => keepTree(this.store, tree, [message]));
  }

  /** Change the tree, and store it.
   * @param {(tree: Tree) => void} action */
  async change(action) {
    const { tree } = this;
    if (!tree) return;
    action(tree);
    this.view.follow = false;
    this.refresh();
    await this.#keep(() => keepTree(this.store, tree));
  }

  /** Store something, and tell whether it succeeded. @param {() => Promise<void>} save */
  async #keep(save) {
    await save().then(
      () => this.#stored(null),
      (error) => this.#stored(error),
    );
  }

  /** @param {unknown} error null: storing succeeded */
  #stored(error) {
    this.trouble.stored(
      error,
      () => this.exportAll(),
      () => this.sidebar.open(true),
    );
  }

  #modelChanged() {
    this.welcome.draw();
    this.view.draw();
    this.panel.usual(this.picker.defaults);
  }

  /** @param {Record<string, string>} settings */
  set(settings) {
    if (!this.tree) return;
    const { conversation } = this.tree;
    conversation.settings = settings;
    this.view.draw();
    keep("settings", JSON.stringify(settings));
    if (!this.conversations.includes(conversation)) return;
    this.#keep(() => this.store.save(conversation));
  }

  // ------------------------------------------------------------------ list of conversations

  /** @param {string} id @param {string} title */
  async rename(id, title) {
    const conversation = this.conversations.find((c) => c.id === id);
    if (!conversation) return;
    conversation.title = title;
    this.refresh();
    await this.#keep(() => this.store.save(conversation));
  }

  /** @param {string} id */
  async remove(id) {
    await this.#keep(() => this.store.remove(id));
    await this.drop(id);
  }

  /** Remove a deleted conversation from the list and the screen.
   * @param {string} id @param {boolean} [elsewhere] whether another tab deleted it */
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

  async exportAll() {
    exportAll(await this.#trees(null));
  }

  /** The trees of one conversation, or of all.
   * @param {string | null} id */
  #trees(id) {
    const chosen = this.conversations.filter((c) => id === null || c.id === id);
    return Promise.all(chosen.map((c) => this.#treeOf(c.id)));
  }

  /** A conversation's tree: the one in use, which may have messages that could not be stored, or the stored one.
   * @param {string} id @returns {Promise<Tree>} */
  async #treeOf(id) {
    if (this.tree?.conversation.id === id) return this.tree;
    const conversation = /** @type {Conversation} */ (this.conversations.find((c) => c.id === id));
    return this.writer.running.get(id)?.tree ?? new Tree(conversation, await this.store.messages(id));
  }

  /** @param {File} file */
  async import(file) {
    try {
      const read = readExport(await file.text());
      for (const { conversation, messages } of read) {
        await this.store.save(conversation, messages);
        this.conversations.push(conversation);
      }
      this.refresh();
      say(`${read.length} imported`);
      this.trouble.banner.over("failed", "storage");
      if (read.length) await this.open(read[0].conversation.id);
    } catch (error) {
      if (isFull(error)) return this.#stored(error);
      const { banner } = this.trouble;
      banner.show("failed", `${file.name} was not imported: ${/** @type {Error} */ (error).message}.`, [
        ["Choose another file", () => the("file").click()],
        ["Dismiss", () => banner.hide()],
      ]);
    }
  }
}

new Page(await Store.open()).start();
