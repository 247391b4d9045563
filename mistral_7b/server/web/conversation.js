/** The conversation on the screen: draws the path through its tree, and no more of it than has changed. */

import { Alternatives } from "./alternatives.js";
import { icon, the } from "./dom.js";
import { MessageView } from "./message.js";

/** @typedef {import("./tree.js").Tree} Tree */

export class ConversationView {
  /** @param {import("./message.js").Deeds & {branch: (id: string, i: number, k: number) => void}} deeds */
  constructor(deeds) {
    this.deeds = deeds;
    this.alternatives = new Alternatives(deeds.branch);
    this.list = the("messages");
    this.scroll = the("scroll");
    /** @type {Map<string, MessageView>} */
    this.views = new Map();
    /** @type {Tree | null} */
    this.tree = null;
    this.tinted = true;
    this.idle = true;
    this.pending = 0;
    this.cost = 0;
    this.follow = true;
    this.down = the("down");
    this.down.append(icon("down"));
    this.down.addEventListener("click", () => {
      this.follow = true;
      this.#toEnd();
      the("ask").focus({ preventScroll: true });
    });
    this.scroll.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new ResizeObserver(() => this.#toEnd()).observe(this.scroll); // a keyboard comes up, a banner appears
  }

  #scrolled() {
    const below = this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight;
    this.follow = below < 60;
    this.down.hidden = below < 240;
  }

  /** To the end, if that is where one was; not from under a pointer that chooses a token. */
  #toEnd() {
    if (this.alternatives.open) return;
    if (this.follow) this.scroll.scrollTop = this.scroll.scrollHeight;
    this.#scrolled();
  }

  /** Bring a message to the eye. @param {string} id */
  point(id) {
    this.follow = false;
    const { element } = this.views.get(id) ?? {};
    element?.scrollIntoView({ block: "start" });
    element?.classList.add("pointed");
    element?.addEventListener("animationend", () => element.classList.remove("pointed"), { once: true });
  }

  /** @param {Tree | null} tree @param {boolean} idle nothing is being written in it */
  show(tree, idle) {
    if (tree !== this.tree) {
      this.views.clear();
      this.list.replaceChildren();
      this.follow = true;
    }
    this.tree = tree;
    this.idle = idle;
    this.draw();
  }

  /** Draw soon: many tokens may come before. What takes long to draw is drawn less often. */
  drawSoon() {
    if (this.pending) return;
    this.pending = setTimeout(() => this.draw(), Math.max(40, 5 * this.cost));
  }

  draw() {
    clearTimeout(this.pending);
    this.pending = 0;
    const began = performance.now();
    const focus = this.#focus();
    const { tree } = this;
    const { shown: how, format } = tree?.conversation.settings ?? {};
    const path = tree?.path() ?? [];
    the("empty").hidden = path.length > 0;
    if (!tree) return;
    const shown = path.filter((m) => m.role !== "tool");
    const kept = new Set(shown.map((m) => m.id));
    for (const [id, view] of this.views) {
      if (kept.has(id)) continue;
      view.element.remove();
      this.views.delete(id);
    }
    shown.forEach((message, i) => {
      let view = this.views.get(message.id);
      if (!view) {
        view = new MessageView(message, this.deeds, this.alternatives);
        this.views.set(message.id, view);
      }
      if (this.list.children[i] !== view.element)
        this.list.insertBefore(view.element, this.list.children[i] ?? null);
      const next = path[path.indexOf(message) + 1];
      view.update({
        ...this.#place(message.id),
        tinted: this.tinted,
        plain: how === "plain" || (Boolean(format) && /^\s*\{/.test(message.content)), // JSON is no markdown
        idle: this.idle,
        results: next?.role === "tool" ? { message: next, ...this.#place(next.id) } : undefined,
      });
    });
    this.alternatives.follow();
    this.#refocus(focus);
    this.#toEnd();
    this.cost = performance.now() - began;
  }

  /** Which button has the focus: the message's place, and what the button says. */
  #focus() {
    const button = this.list.contains(document.activeElement) && document.activeElement?.closest("button");
    if (!button) return null;
    const at = [...this.list.children].indexOf(button.closest(".message"));
    return { button, at, label: button.getAttribute("aria-label") ?? button.textContent };
  }

  /** A button drawn anew, or on another version of its message, has the focus again; if there is none, what is
   * written with.
   * @param {{button: HTMLElement, at: number, label: string | null} | null} focus */
  #refocus(focus) {
    if (!focus || (focus.button.isConnected && document.activeElement === focus.button)) return;
    const buttons = /** @type {HTMLButtonElement[]} */ ([
      ...(this.list.children[focus.at]?.querySelectorAll("button:not(:disabled)") ?? []),
    ]);
    const same = buttons.find((b) => (b.getAttribute("aria-label") ?? b.textContent) === focus.label);
    const turned = buttons.find((b) => b.closest(".siblings"));
    (same ?? (focus.label?.startsWith("Version") ? turned : null) ?? the("ask")).focus({ preventScroll: true });
  }

  /** @param {string} id */
  #place(id) {
    const siblings = this.tree?.siblings(id) ?? [id];
    return { siblings: siblings.length, at: siblings.indexOf(id) };
  }

  /** Begin to edit the last message that a person wrote. */
  editLast() {
    const last = this.tree?.path().findLast((m) => m.role === "user");
    if (last) this.views.get(last.id)?.edit();
  }
}
