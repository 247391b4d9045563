/** The box to write in, and the button that sends or stops. */

import { icon, the } from "./dom.js";

export class Composer {
  /** @param {{send: (text: string) => boolean | Promise<boolean>, stop: () => void, editLast: () => void}} deeds
   * `send` says whether the text was taken */
  constructor(deeds) {
    this.deeds = deeds;
    this.area = the("ask");
    this.button = the("send");
    the("composer").addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      if (this.busy) deeds.stop();
      else this.#send();
    });
    this.area.addEventListener("input", () => this.#fit());
    this.area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.isComposing) return; // Enter ends a word of an input method
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        if (!this.busy) this.#send();
      } else if (event.key === "ArrowUp" && !this.area.value) {
        event.preventDefault();
        deeds.editLast();
      }
    });
    /** @type {boolean | undefined} */
    this.busy = undefined;
    this.show(false);
  }

  /** @param {boolean} busy whether an answer is being written */
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
    if (!(await this.deeds.send(text)) && !this.area.value) {
      this.area.value = text;
      this.#fit();
    }
  }

  /** As high as the text, up to what style.css allows. */
  #fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
    this.button.disabled = !this.busy && !this.area.value.trim();
  }
}
