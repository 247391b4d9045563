/** Error handling: for each kind of problem, a message and an action for the user to choose. */

import { hasKey, Problem, useKey } from "./api.js";
import { Banner } from "./banner.js";
import { say, the } from "./dom.js";

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
        this.banner.show("key", "This server requires an API key.", [["Enter key", () => this.#askForKey(why, again)]]);
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
