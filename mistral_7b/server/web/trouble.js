/** What to do when the server does not answer as it should: each kind of problem has a way on that a person chooses. */

import { hasKey, Problem, useKey } from "./api.js";
import { Banner } from "./banner.js";
import { say, the } from "./dom.js";

export class Trouble {
  /** @param {import("./models.js").Picker} picker */
  constructor(picker) {
    this.picker = picker;
    this.banner = new Banner();
  }

  /** Ask the server what models it has: the first thing asked of it, and the first after it was gone. */
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

  /** @param {Problem} problem @param {() => void} again asks once more for what did not come */
  meet({ kind, message, wait }, again) {
    if (kind === "key") this.#askForKey(message, again);
    else if (kind === "full") this.banner.full(message, "There may be room", wait, again);
    else if (kind === "closing") this.banner.full(message, "It may be back", wait, again);
    else if (kind === "lost") this.banner.lost(message, () => this.#found());
    else if (this.picker.models.length)
      say(message); // the message that it happened to shows it
    else this.banner.show("failed", message, [["Try again", () => this.connect()]]);
  }

  /** The server is back. An answer that was cut waits for the person to go on with it. */
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
    the("key-why").textContent = hasKey() ? `The key was not taken: ${why}` : why;
    if (dialog.open) return;
    the("key").value = "";
    dialog.returnValue = "";
    dialog.showModal();
    const closed = async () => {
      if (dialog.returnValue !== "ok" || !the("key").value.trim()) {
        this.banner.show("key", "This server asks for a key.", [["Give one", () => this.#askForKey(why, again)]]);
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
