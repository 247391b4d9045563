/** The message box with its attached files, and the button that sends or stops. */

import { Attachments } from "./attach.js";
import { icon, the } from "./dom.js";

export class Composer {
  /** @param {{send: (text: string) => boolean | Promise<boolean>, stop: () => void, editLast: () => void,
   *   refuse: (problem: string) => void}} actions
   * `send` returns whether the text was accepted */
  constructor(actions) {
    this.actions = actions;
    this.area = the("ask");
    this.attachments = new Attachments(actions.refuse, () => this.#fit());
    this.button = the("send");
    the("composer").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      if (this.busy) actions.stop();
      else this.#send();
    });
    this.area.addEventListener("input", () => this.#fit());
    this.area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.isComposing) return; // Enter confirms input method text
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        if (!this.busy) this.#send();
      } else if (event.key === "ArrowUp" && !this.area.value) {
        event.preventDefault();
        actions.editLast();
      }
    });
    /** @type {boolean | undefined} */
    this.busy = undefined;
    this.show(false);
  }

  /** @param {boolean} busy whether an answer is streaming */
  show(busy) {
    if (this.busy !== busy) {
      this.busy = busy;
      this.button.setAttribute("aria-label", busy ? "Stop" : "Send");
      this.button.title = busy ? "Stop (Escape)" : "Send (Enter)";
      this.button.replaceChildren(icon(busy ? "stop" : "send"));
    }
    this.button.disabled = !busy && this.#empty;
  }

  get #empty() {
    return !this.area.value.trim() && !this.attachments.files.length;
  }

  /** Put a text into the box, in place of what is in it.
   * @param {string} text */
  use(text) {
    this.area.value = text;
    this.#fit();
    this.area.focus();
  }

  focus() {
    this.area.focus();
  }

  async #send() {
    const text = this.area.value;
    const { files } = this.attachments;
    if (this.#empty) return;
    const message = this.attachments.message(text);
    this.area.value = "";
    this.attachments.set([]);
    if ((await this.actions.send(message)) || this.area.value) return;
    this.area.value = text;
    this.attachments.set(files);
  }

  /** Fit the box's height to the text; style.css sets the maximum. */
  #fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
    this.button.disabled = !this.busy && this.#empty;
  }
}
