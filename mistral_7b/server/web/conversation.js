/** The view of the current conversation. Draws the chosen path through its tree, and redraws only what changed. */

import { Alternatives } from "./alternatives.js";
import { icon, the } from "./dom.js";
import { MessageView } from "./message.js";

/** @typedef {import("./tree.js").Tree} Tree */

export class ConversationView {
  /** @param {import("./message.js").Actions & {branch: (id: string, i: number, k: number) => void}} actions
   * @param {(model: string | undefined) => boolean} plainly whether a model's answers are plain text */
  constructor(actions, plainly) {
    this.actions = actions;
    this.plainly = plainly;
    this.alternatives = new Alternatives(actions.branch);
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
    this.height = 0;
    this.down = the("down");
    this.down.append(icon("down"));
    this.down.addEventListener("click", () => {
      this.follow = true;
      this.#toEnd();
      the("ask").focus({ preventScroll: true });
    });
    this.scroll.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new ResizeObserver(() => this.#toEnd()).observe(this.scroll); // a keyboard or banner changes the height
  }

  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroll;
    const below = scrollHeight - scrollTop - clientHeight;
    if (below < 60) this.follow = true;
    else if (clientHeight === this.height) this.follow = false; // not if a banner changed the height
    this.height = clientHeight;
    this.down.hidden = below < 240;
  }

  /** Scroll to the end if the view follows it, unless the list of alternatives is open. */
  #toEnd() {
    if (this.alternatives.open) return;
    if (this.follow && this.views.size) this.scroll.scrollTop = this.scroll.scrollHeight;
    this.#scrolled();
  }

  /** Scroll to a message and highlight it. @param {string} id */
  point(id) {
    this.follow = false;
    const { element } = this.views.get(id) ?? {};
    element?.scrollIntoView({ block: "start" });
    element?.classList.add("pointed");
    element?.addEventListener("animationend", () => element.classList.remove("pointed"), { once: true });
  }

  /** @param {Tree | null} tree @param {boolean} idle whether no answer is streaming in it */
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

  /** Schedule a draw that covers all tokens until then. Slow draws are scheduled less often. */
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
        view = new MessageView(message, this.actions, this.alternatives);
        this.views.set(message.id, view);
      }
      if (this.list.children[i] !== view.element)
        this.list.insertBefore(view.element, this.list.children[i] ?? null);
      const next = path[path.indexOf(message) + 1];
      view.update({
        ...this.#place(message.id),
        tinted: this.tinted,
        plain:
          how === "plain" ||
          (Boolean(format) && /^\s*\{/.test(message.content)) || // JSON is not Markdown
          (how !== "markdown" && this.plainly(message.model)),
        idle: this.idle,
        results: next?.role === "tool" ? { message: next, ...this.#place(next.id) } : undefined,
      });
    });
    this.alternatives.follow();
    this.#refocus(focus);
    this.#toEnd();
    this.cost = performance.now() - began;
  }

  /** The focused button, with the index of its message and its label. */
  #focus() {
    const button = this.list.contains(document.activeElement) && document.activeElement?.closest("button");
    if (!button) return null;
    const at = [...this.list.children].indexOf(button.closest(".message"));
    return { button, at, label: button.getAttribute("aria-label") ?? button.textContent };
  }

  /** Restore the focus to the button's replacement after a redraw or a change of version, or to the message box.
   * @param {{button: HTMLElement, at: number, label: string | null} | null} focus */
  #refocus(focus) {
    if (!focus || (focus.button.isConnected && document.activeElement === focus.button)) return;
    const buttons = /** @type {HTMLButtonElement[]} */ ([
      ...(this.list.children[focus.at]?.querySelectorAll("button:not(:disabled)") ?? []),
    ]);
    const same = buttons.find((b) => (b.getAttribute("aria-label") ?? b.textContent) === focus.label);
    const versions = buttons.find((b) => b.closest(".siblings"));
    (same ?? (focus.label?.endsWith(" version") ? versions : null) ?? the("ask")).focus({ preventScroll: true });
  }

  /** @param {string} id */
  #place(id) {
    const siblings = this.tree?.siblings(id) ?? [id];
    return { siblings: siblings.length, at: siblings.indexOf(id) };
  }

  /** Edit the last user message. */
  editLast() {
    const last = this.tree?.path().findLast((m) => m.role === "user");
    if (last) this.views.get(last.id)?.edit();
  }
}
