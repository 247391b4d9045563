/** The list of conversations: search, rename, export, delete. */

import { confirmed, iconButton, make, the } from "./dom.js";

/** @typedef {import("./tree.js").Conversation} Conversation */

/**
 * @typedef {Object} Deeds
 * @property {(id: string) => void} open
 * @property {() => void} begin
 * @property {(id: string, title: string) => void} rename
 * @property {(id: string) => void} remove
 * @property {(id: string | null) => void} save   one as a file, or all
 * @property {(file: File) => void} load
 * @property {(query: string) => Promise<Set<string>>} search
 */

export class Sidebar {
  /** @param {Deeds} deeds */
  constructor(deeds) {
    this.deeds = deeds;
    this.list = the("conversations");
    /** @type {Conversation[]} */
    this.conversations = [];
    this.current = "";
    /** @type {Set<string> | null} */
    this.found = null;
    this.menu = the("menu");
    the("new").addEventListener("click", () => deeds.begin());
    the("export").addEventListener("click", () => deeds.save(null));
    the("import").addEventListener("click", () => the("file").click());
    the("file").addEventListener("change", () => {
      const [file] = the("file").files;
      if (file) deeds.load(file);
      the("file").value = ""; // so that the same file can be read again
    });
    the("search").addEventListener("input", () => this.#searchSoon());
    this.menu.addEventListener("click", () => this.open(!this.isOpen));
    the("shade").addEventListener("click", () => this.open(false));
    the("sidebar").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Escape" && narrow.matches) this.open(false);
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

  /** On a phone the list covers the page, and goes when its work is done. */
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
      this.found = query ? await this.deeds.search(query) : null;
      this.#draw();
    }, 120);
  }

  #draw() {
    const shown = this.conversations.filter((c) => this.found?.has(c.id) ?? true);
    this.list.replaceChildren(...shown.map((c) => this.#item(c)));
    the("none").hidden = shown.length > 0;
    the("none").textContent = this.found ? "Nothing found." : "Conversations are kept in this browser alone.";
    the("export").disabled = this.conversations.length === 0;
  }

  /** @param {Conversation} conversation */
  #item(conversation) {
    const { id, title } = conversation;
    const item = make(
      "li",
      { class: id === this.current ? "current" : "" },
      make(
        "button",
        {
          class: "open",
          type: "button",
          title,
          "aria-current": id === this.current ? "true" : null,
          onclick: () => this.deeds.open(id),
        },
        title,
      ),
      make(
        "span",
        { class: "deeds" },
        iconButton("edit", `Rename ${title}`, () => this.#rename(item, conversation)),
        iconButton("save", `Export ${title}`, () => this.deeds.save(id)),
        iconButton("bin", `Delete ${title}`, async () => {
          if (
            await confirmed("Delete this conversation?", `“${title}” and all its versions will be gone.`, "Delete")
          )
            this.deeds.remove(id);
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
      if (keep && input.value.trim()) this.deeds.rename(id, input.value.trim());
      else this.#draw();
    };
    input.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" || event.key === "Escape") {
        event.stopPropagation();
        end(event.key === "Enter");
      }
    });
    input.addEventListener("blur", () => end(true));
    item.replaceChildren(input);
    input.select();
  }
}

const narrow = matchMedia("(max-width: 760px)");
