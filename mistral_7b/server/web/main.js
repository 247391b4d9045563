/** The page: what is on the screen, and what its buttons do. */

import { Composer } from "./composer.js";
import { ConversationView } from "./conversation.js";
import { icon, say, the } from "./dom.js";
import { Picker } from "./models.js";
import { Panel } from "./panel.js";
import { faults } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { keep, kept, Store } from "./storage.js";
import { switchTheme } from "./theme.js";
import { branch } from "./tint.js";
import { exportAll, readExport } from "./transfer.js";
import { newId, Tree } from "./tree.js";
import { Trouble } from "./trouble.js";
import { Writer } from "./writer.js";

/** @typedef {import("./tree.js").Conversation} Conversation @typedef {import("./tree.js").Message} Message */

class Page {
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
      branch: (id, i, k) =>
        this.withTree((tree) => this.writer.ask(tree, tree.get(id).parent, branch(tree.get(id), i, k))),
    });
    this.sidebar = new Sidebar({
      open: (id) => this.open(id),
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
    this.panel = new Panel(the("panel"), the("settings"), (settings) => this.set(settings));
    this.#buttons();
  }

  #buttons() {
    the("menu").append(icon("menu"));
    the("settings").append(icon("settings"));
    switchTheme(the("theme"));
    const tint = the("tint");
    const draw = (/** @type {boolean} */ on) => {
      tint.setAttribute("aria-pressed", String(on));
      the("legend").hidden = !on;
      this.view.tinted = on;
      this.view.draw();
    };
    tint.addEventListener("click", () => {
      keep("tint", this.view.tinted ? "off" : null);
      draw(!this.view.tinted);
    });
    draw(kept("tint") !== "off");
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.busy) this.stop();
      else if ((event.ctrlKey || event.metaKey) && event.key === "k") {
        this.sidebar.open(true);
        the("search").focus();
      } else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o")
        this.begin();
      else return;
      event.preventDefault();
    });
  }

  /** Show what the browser kept, and ask the server what it has. */
  async start() {
    this.conversations = await this.store.conversations();
    const wanted = location.hash.slice(1);
    if (this.conversations.some((c) => c.id === wanted)) await this.open(wanted);
    else this.begin();
    await this.trouble.connect();
  }

  get busy() {
    return this.writer.busy(this.tree?.conversation.id);
  }

  stop() {
    if (this.tree) this.writer.stop(this.tree.conversation.id);
  }

  // ------------------------------------------------------------------ which conversation

  /** An empty conversation, which is kept once something is said in it. */
  begin() {
    let settings = {};
    try {
      settings = JSON.parse(kept("settings") ?? "{}");
    } catch {
      /* the defaults do */
    }
    const now = Date.now();
    this.tree = new Tree({ id: newId(), title: "", created: now, updated: now, chosen: {}, settings });
    this.#opened();
    this.composer.focus();
  }

  /** @param {string} id */
  async open(id) {
    const conversation = this.conversations.find((c) => c.id === id);
    if (!conversation) return;
    const running = this.writer.running.get(id);
    const messages = running ? [] : await this.store.messages(id);
    for (const message of messages.filter((m) => m.state === "streaming")) {
      message.state = message.content ? "cut" : "failed";
      message.problem = "The page was closed while this was being written.";
    }
    this.tree = running?.tree ?? new Tree(conversation, messages);
    this.#opened();
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
   * @param {string} id @param {string} text */
  edit(id, text) {
    this.withTree((tree) => {
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
    await this.store.save(tree.conversation, tree.path());
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
    await this.writer.stop(id);
    this.conversations = this.conversations.filter((c) => c.id !== id);
    await this.store.remove(id);
    if (this.tree?.conversation.id === id) this.begin();
    else this.refresh();
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
      this.trouble.banner.show("failed", `${file.name} was not read: ${/** @type {Error} */ (error).message}.`, [
        ["Dismiss", () => this.trouble.banner.hide()],
      ]);
    }
  }
}

new Page(await Store.open()).start();
