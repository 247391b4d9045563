/** Error handling: for each kind of problem, a message and an action for the user to choose. */

import { hasKey, Problem, useKey } from "./api.js";
import { Banner } from "./banner.js";
import { say, the } from "./dom.js";
import { isFull, keep } from "./storage.js";

export class Trouble {
  /** @param {import("./models.js").Picker} picker */
  constructor(picker) {
    this.picker = picker;
    this.banner = new Banner();
  }

  /** Load the list of models: the first request, also after a lost connection. */
  async connect() {
    try {
      await this.picker.load();
      this.banner.hide();
    } catch (error) {
      this.picker.unknown("Not connected");
      if (!(error instanceof Problem)) throw error;
      this.meet(error, () => this.connect());
    }
  }

  /** Tell that something could not be stored, and offer a way out; null clears that message.
   * @param {unknown} error
   * @param {() => void} save exports all conversations @param {() => void} list shows them */
  stored(error, save, list) {
    if (!error) return this.banner.over("storage");
    const why = isFull(error)
      ? "The browser's storage for this page is full, so the last change is not stored."
      : `The browser could not store the last change: ${/** @type {any} */ (error).message ?? error}.`;
    if (this.banner.kind === "storage") return; // already told
    this.banner.show("storage", `${why} Export the conversations, then delete some of them.`, [
      ["Export all", save],
      ["Choose what to delete", list],
      ["Dismiss", () => this.banner.hide()],
    ]);
  }

  /** Tell whether the storage for settings is full.
   * @param {boolean} full @param {() => void} save exports all conversations */
  kept(full, save) {
    if (!full) return this.banner.over("settings");
    if (this.banner.kind === "settings") return;
    const text = "The browser's storage for settings is full, so new settings last only until the page is closed.";
    this.banner.show("settings", text, [
      ["Export all", save],
      ["Delete stored settings", () => ["settings", "model", "theme", "tint"].forEach((name) => keep(name, null))],
      ["Dismiss", () => this.banner.hide()],
    ]);
  }

  /** @param {Problem} problem @param {() => void} again repeats the failed request */
  meet({ kind, message, wait }, again) {
    if (kind === "key") this.#askForKey(message, again);
    else if (kind === "full") this.banner.full(message, "The queue may have room", wait, again);
    else if (kind === "closing") this.banner.full(message, "The server may be back", wait, again);
    else if (kind === "lost") this.banner.lost(message, () => this.#found());
    else if (this.picker.models.length)
      say(message); // the failed answer shows the error
    else this.banner.show("failed", message, [["Try again", () => this.connect()]]);
  }

  /** Reload the models once the server is back. A cut answer is continued only if the user chooses to. */
  async #found() {
    const first = !this.picker.models.length;
    try {
      await this.picker.load();
      if (first) this.banner.hide();
    } catch (error) {
      if (error instanceof Problem) this.meet(error, () => this.connect());
    }
  }

  /** @param {string} why @param {() => void} again */
  #askForKey(why, again) {
    const dialog = the("key-dialog");
    the("key-why").textContent = hasKey() ? `The key was rejected: ${why}` : why;
    if (dialog.open) return;
    the("key").value = "";
    dialog.returnValue = "";
    dialog.showModal();
    const closed = async () => {
      if (dialog.returnValue !== "ok" || !the("key").value.trim()) {
        this.banner.show("key", "This server requires an API key.", [
          ["Enter key", () => this.#askForKey(why, again)],
        ]);
        return;
      }
      useKey(the("key").value);
      this.banner.hide();
      if (this.picker.models.length) again();
      else await this.connect();
    };
    dialog.addEventListener("close", closed, { once: true });
  }
}
