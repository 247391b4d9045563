/** The view of one message: text, tool calls, status and buttons. */

import { Alternatives } from "./alternatives.js";
import { drawMessage } from "./attach.js";
import { copy, iconButton, make } from "./dom.js";
import { Rendered } from "./markdown.js";
import { place, tint } from "./tint.js";
import { drawCalls } from "./tools.js";

/** @typedef {import("./tree.js").Message} Message */

/**
 * The actions of a message's buttons.
 * @typedef {Object} Actions
 * @property {(id: string, by: number) => void} move      show another version
 * @property {(id: string, text: string) => boolean} edit   returns whether the edit was accepted
 * @property {(id: string, good: boolean | undefined) => void} rate   undefined: no rating
 * @property {(id: string) => void} again        generate another version
 * @property {(id: string) => void} resume         continue this answer
 * @property {(id: string) => void} retry        repeat a failed request
 * @property {(id: string, results: {id: string, content: string}[]) => void} results
 */

/**
 * Context of a message: its index among its siblings, how to draw it, whether no answer is streaming in the
 * conversation, and the results of its tool calls with their own index.
 * @typedef {{siblings: number, at: number, tinted: boolean, plain: boolean, idle: boolean,
 *   results?: {message: Message, siblings: number, at: number}}} How
 */

export class MessageView {
  /** @param {Message} message @param {Actions} actions @param {Alternatives} alternatives */
  constructor(message, actions, alternatives) {
    this.message = message;
    this.actions = actions;
    this.text = make("div", { class: "text", dir: message.role === "user" ? "auto" : null });
    this.calls = make("div", { class: "calls", hidden: true });
    this.notice = make("div", { class: "notice", hidden: true });
    this.foot = make("div", { class: "foot" });
    const user = message.role === "user";
    this.element = make(
      "article",
      { class: `message ${message.role}`, "aria-label": user ? "You" : "Answer", data: { id: message.id } },
      this.text,
      this.calls,
      this.notice,
      this.foot,
    );
    this.rendered = user ? null : new Rendered(this.text);
    if (this.rendered) {
      this.rendered.onload = () => this.#tint(this.rendered?.again() ?? [], this.tinted);
      alternatives.watch(
        this.text,
        message.id,
        () => this.message.tokens ?? [],
        () => this.tinted,
      );
    }
    this.tinted = false;
    this.drawn = "";
    this.shown = "";
    /** @type {HTMLElement | null} */
    this.editing = null;
  }

  get busy() {
    return this.message.state === "streaming";
  }

  /** Redraw what has changed.
   * @param {How} how */
  update(how) {
    const { message } = this;
    if (this.editing) return;
    if (this.rendered) this.#answer(how.tinted, how.plain);
    else if (this.shown !== message.content) drawMessage(this.text, (this.shown = message.content));
    this.element.setAttribute("aria-busy", String(this.busy));
    const state = JSON.stringify([
      how,
      message.state,
      message.problem,
      message.good,
      message.calls,
      !message.content,
      !message.tokens?.length,
    ]);
    if (state === this.drawn) return this.#stats();
    this.drawn = state;
    const calls = message.calls ?? [];
    this.calls.hidden = !calls.length;
    const send = how.idle ? (/** @type {any} */ results) => this.actions.results(message.id, results) : null;
    const given = how.results;
    drawCalls(
      this.calls,
      calls,
      given?.message.results,
      send,
      given && this.#versions("Results", given.message.id, given.siblings, given.at, how.idle),
    );
    this.#notice(how.idle);
    this.#foot(how);
    this.#stats();
  }

  /** @param {boolean} tinted @param {boolean} plain */
  #answer(tinted, plain) {
    const { message, rendered } = this;
    if (!rendered) return;
    this.element.classList.toggle("waiting", this.busy && !message.content && !message.calls?.length);
    const wasTinted = this.tinted;
    this.tinted = tinted;
    let made = rendered.show(message.content, plain);
    if (wasTinted && !tinted) made = rendered.again();
    if (!wasTinted && tinted) made = rendered.blocks;
    this.#tint(made, tinted);
    if (tinted && !this.busy) Alternatives.reach(this.text, (i) => message.tokens?.[i]);
  }

  /** @param {import("./markdown.js").Block[]} blocks @param {boolean} tinted */
  #tint(blocks, tinted) {
    const tokens = this.message.tokens ?? [];
    if (!tinted || !tokens.length || !blocks.length) return;
    const ends = place(this.message);
    for (const block of blocks) tint(block, tokens, ends);
  }

  /** @param {boolean} idle */
  #notice(idle) {
    const { message } = this;
    const { state } = message;
    const said =
      state === "stopped"
        ? "Stopped."
        : state === "length"
          ? "Stopped at the token limit"
          : state === "full"
            ? "No answer yet."
            : state === "cut" || state === "failed"
              ? (message.problem ?? "The answer is incomplete.")
              : "";
    this.notice.hidden = !said || message.role !== "assistant";
    this.notice.className = `notice ${state}`;
    const some = Boolean(message.content) && !message.calls?.length;
    const buttons =
      !idle || this.notice.hidden
        ? []
        : [
            some && make("button", { type: "button", onclick: () => this.actions.resume(message.id) }, "Continue"),
            (state === "cut" || state === "failed" || (state === "full" && !some)) &&
              make(
                "button",
                {
                  type: "button",
                  class: some ? "quiet" : "",
                  onclick: () => (some ? this.actions.again(message.id) : this.actions.retry(message.id)),
                },
                some ? "Start over" : "Try again",
              ),
          ];
    const dot = state === "length" && buttons[0] ? make("span", { "aria-hidden": "true", text: "·" }) : "";
    this.notice.replaceChildren(make("span", { text: said }), dot, ...buttons.filter(Boolean));
  }

  /** @param {{siblings: number, at: number, idle: boolean}} how */
  #foot({ siblings, at, idle }) {
    const { message, actions } = this;
    this.stats = make("span", { class: "stats" });
    const answer = message.role === "assistant";
    const copying = iconButton("copy", "Copy", () => copy(copying, message.content));
    const rating = (/** @type {boolean} */ good) => {
      const pressed = message.good === good;
      const rate = () => actions.rate(message.id, pressed ? undefined : good);
      return iconButton(good ? "good" : "bad", good ? "Good answer" : "Bad answer", rate, {
        "aria-pressed": String(pressed),
      });
    };
    const ratings = answer && (message.content || message.calls?.length) ? [rating(true), rating(false)] : [];
    const parts = this.busy
      ? []
      : [
          this.#versions("Versions", message.id, siblings, at, idle),
          message.content && copying,
          ...ratings,
          idle && message.content && iconButton("edit", "Edit", () => this.edit()),
          idle && answer && iconButton("again", "Regenerate", () => actions.again(message.id)),
          idle &&
            answer &&
            message.content &&
            !message.calls?.length &&
            iconButton("resume", "Continue", () => actions.resume(message.id)),
        ];
    this.foot.replaceChildren(...parts.filter(Boolean), this.stats);
  }

  /** Buttons that switch between siblings; null if there is only one.
   * @param {string} label @param {string} id @param {number} siblings @param {number} at @param {boolean} idle */
  #versions(label, id, siblings, at, idle) {
    if (siblings < 2) return null;
    const move = (/** @type {number} */ by) => () => this.actions.move(id, by);
    return make(
      "span",
      { class: "siblings", role: "group", "aria-label": label },
      iconButton("back", "Previous version", move(-1), { disabled: at === 0 || !idle }),
      make("span", { text: `${at + 1} / ${siblings}` }),
      iconButton("forth", "Next version", move(1), { disabled: at === siblings - 1 || !idle }),
    );
  }

  #stats() {
    const { message } = this;
    if (!this.stats || message.role !== "assistant") return;
    const tokens = message.tokens?.length || message.usage?.completion_tokens;
    this.stats.textContent = [
      message.first !== undefined && `${(message.first / 1000).toFixed(2)} s to first token`,
      message.rate !== undefined && `${message.rate.toFixed(1)} tokens/s`,
      tokens && `${tokens} token${tokens === 1 ? "" : "s"}`,
    ]
      .filter(Boolean)
      .join("  ·  ");
  }

  /** Open an editor in place of the text. */
  edit() {
    const { message } = this;
    const area = make("textarea", {
      "aria-label": "Edit the message",
      rows: Math.min(14, message.content.split("\n").length + 1),
    });
    area.value = message.content;
    const close = () => {
      this.editing?.remove();
      this.editing = null;
      this.text.hidden = this.foot.hidden = false;
      this.element.classList.remove("editing");
    };
    const save = () => {
      if (!area.value.trim()) return;
      close();
      if (!this.actions.edit(message.id, area.value)) open();
    };
    const open = () => {
      this.text.hidden = this.foot.hidden = true;
      this.element.classList.add("editing");
      this.text.after(editor);
      this.editing = editor;
      area.focus();
    };
    const editor = make(
      "div",
      { class: "editor" },
      area,
      make(
        "div",
        { class: "buttons" },
        make("span", { class: "hint", text: "The previous version is kept." }),
        make("button", { type: "button", class: "quiet", onclick: close }, "Cancel"),
        make(
          "button",
          { type: "button", class: "main", onclick: save },
          message.role === "user" ? "Send" : "Save",
        ),
      ),
    );
    editor.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    open();
  }
}
