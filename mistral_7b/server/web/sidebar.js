/** The list of conversations: search, rename, export, delete. */

import { confirmed, iconButton, make, the } from "./dom.js";

/** @typedef {import("./search.js").Find} Find @typedef {import("./tree.js").Conversation} Conversation */

/**
 * @typedef {Object} Actions
 * @property {(id: string, message?: string) => void} open   open a conversation, at a message
 * @property {() => void} begin
 * @property {(id: string, title: string) => void} rename
 * @property {(id: string) => void} remove
 * @property {(id: string | null) => void} save   export one conversation, or all
 * @property {(file: File) => void} load
 * @property {(query: string) => Promise<Map<string, Find>>} search
 */

export class Sidebar {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.list = the("conversations");
    /** @type {Conversation[]} */
    this.conversations = [];
    this.current = "";
    /** @type {Map<string, Find> | null} */
    this.found = null;
    this.menu = the("menu");
    the("new").addEventListener("click", () => actions.begin());
    the("export").addEventListener("click", () => actions.save(null));
    the("import").addEventListener("click", () => the("file").click());
    the("file").addEventListener("change", () => {
      const [file] = the("file").files;
      if (file) actions.load(file);
      the("file").value = ""; // else choosing the same file again fires no event
    });
    the("search").addEventListener("input", () => this.#searchSoon());
    this.menu.addEventListener("click", () => this.open(!this.isOpen));
    the("shade").addEventListener("click", () => this.open(false));
    the("sidebar").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Escape" || !narrow.matches) return;
      event.stopPropagation();
      this.open(false);
    });
    narrow.addEventListener("change", () => this.open(!narrow.matches));
    this.open(!narrow.matches);
  }

  /** @param {boolean} open */
  open(open) {
    this.isOpen = open;
    document.body.classList.toggle("sidebar-closed", !open);
    this.menu.setAttribute("aria-expanded", String(open));
    the("shade").hidden = !(open && narrow.matches);
    the("page").inert = open && narrow.matches;
    if (open && narrow.matches) the("new").focus();
    else if (the("sidebar").contains(document.activeElement)) this.menu.focus();
  }

  /** Close the list on a narrow screen, where it covers the page. */
  leave() {
    if (narrow.matches) this.open(false);
  }

  /** @param {Conversation[]} conversations @param {string} current */
  show(conversations, current) {
    this.conversations = conversations;
    this.current = current;
    this.#draw();
  }

  #searchSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      const query = the("search").value.trim();
      this.found = query ? await this.actions.search(query) : null;
      this.#draw();
    }, 120);
  }

  #draw() {
    if (this.renaming) return;
    const at = this.#focus();
    const shown = this.conversations.filter((c) => this.found?.has(c.id) ?? true);
    let age = "";
    this.list.replaceChildren();
    for (const conversation of shown) {
      const before = age;
      age = this.found ? "" : ageOf(conversation.updated);
      if (age !== before) this.list.append(make("li", { class: "age", text: age }));
      this.list.append(this.#item(conversation));
    }
    if (at) this.list.querySelectorAll(`[data-id="${at.id}"] button`)[at.button]?.focus();
    the("none").hidden = shown.length > 0;
    the("none").textContent = this.found ? "No results." : "Conversations are stored only in this browser.";
    the("export").disabled = this.conversations.length === 0;
  }

  /** The focused conversation and the index of its button, to restore the focus after a redraw. */
  #focus() {
    const item = this.list.contains(document.activeElement) && document.activeElement?.closest("li");
    if (!item) return null;
    return { id: item.dataset.id, button: [...item.querySelectorAll("button")].indexOf(document.activeElement) };
  }

  /** @param {Conversation} conversation */
  #item(conversation) {
    const { id, title } = conversation;
    const found = this.found?.get(id);
    const around = found?.around;
    const item = make(
      "li",
      { class: id === this.current ? "current" : "", data: { id } },
      make(
        "button",
        {
          class: "open",
          type: "button",
          title,
          "aria-current": id === this.current ? "true" : null,
          onclick: () => this.actions.open(id, found?.message),
        },
        make("span", { text: title, dir: "auto" }),
        around && make("small", { dir: "auto" }, around[0], make("mark", { text: around[1] }), around[2]),
      ),
      make(
        "span",
        { class: "actions" },
        iconButton("edit", `Rename ${title}`, () => this.#rename(item, conversation)),
        iconButton("save", `Export ${title}`, () => this.actions.save(id)),
        iconButton("bin", `Delete ${title}`, async () => {
          if (
            await confirmed("Delete conversation?", `“${title}” and all its versions will be deleted.`, "Delete")
          )
            this.actions.remove(id);
        }),
      ),
    );
    return item;
  }

  /** @param {HTMLElement} item @param {Conversation} conversation */
  #rename(item, { id, title }) {
    const input = make("input", { "aria-label": "Title", class: "rename" });
    input.value = title;
    let over = false;
    const end = (/** @type {boolean} */ keep) => {
      if (over) return;
      over = true;
      this.renaming = false;
      if (keep && input.value.trim()) this.actions.rename(id, input.value.trim());
      else this.#draw();
    };
    input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" || event.key === "Escape") {
        event.stopPropagation();
        end(event.key === "Enter");
      }
    });
    input.addEventListener("blur", () => end(true));
    this.renaming = true; // suspends redraws of the list
    item.replaceChildren(input);
    input.select();
  }
}

/** The heading for a conversation's age. @param {number} time milliseconds since 1970 */
function ageOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  const days = Math.ceil((today - time) / 86_400_000);
  return days <= 1 ? "Yesterday" : days <= 7 ? "Last week" : days <= 31 ? "Last month" : "Older";
}

const narrow = matchMedia("(max-width: 760px)");
