/** The message box, and the button that sends or stops. */

import { icon, the } from "./dom.js";

export class Composer {
  /** @param {{send: (text: string) => boolean | Promise<boolean>, stop: () => void, editLast: () => void}} actions
   * `send` returns whether the text was accepted */
  constructor(actions) {
    this.actions = actions;
    this.area = the("ask");
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
    this.button.disabled = !busy && !this.area.value.trim();
  }

  focus() {
    this.area.focus();
  }

  async #send() {
    const text = this.area.value;
    if (!text.trim()) return;
    this.area.value = "";
    this.#fit();
    if (!(await this.actions.send(text)) && !this.area.value) {
      this.area.value = text;
      this.#fit();
    }
  }

  /** Fit the box's height to the text; style.css sets the maximum. */
  #fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
    this.button.disabled = !this.busy && !this.area.value.trim();
  }
}
