/** What stands in the way of asking: no server, no place in its queue, no key. */

import { alive } from "./api.js";
import { make, say, the } from "./dom.js";

export class Banner {
  constructor() {
    this.box = the("banner");
    this.timer = 0;
    this.turn = 0; // a banner that was replaced must not go on counting
  }

  hide() {
    this.turn++;
    clearInterval(this.timer);
    this.box.hidden = true;
  }

  /** @param {string} kind @param {string} text @param {[string, () => void][]} [deeds] */
  show(kind, text, deeds = []) {
    this.hide();
    this.box.className = kind;
    this.words = make("span", { text });
    this.box.replaceChildren(
      make("i", { class: "dot" }),
      this.words,
      ...deeds.map(([label, deed]) => make("button", { type: "button", onclick: deed }, label)),
    );
    this.box.hidden = false;
  }

  /** The queue is full: count down, and ask again only if the person says so.
   * @param {string} said @param {string} hope what may be in so many seconds
   * @param {number} seconds @param {() => void} again */
  full(said, hope, seconds, again) {
    let left = seconds;
    let chosen = false;
    const go = () => {
      this.hide();
      again();
    };
    this.show("full", "", [
      ["Try now", go],
      [
        "Try when it is time",
        () => {
          chosen = true;
          draw();
          this.box.lastElementChild?.remove();
          if (left <= 0) go();
        },
      ],
    ]);
    const draw = () => {
      if (!this.words) return;
      this.words.textContent =
        left <= 0 ? `${said} ${hope} now.` : `${said} ${chosen ? "Trying again" : hope} in ${left} s.`;
    };
    draw();
    this.box.setAttribute("role", "group"); // a count read aloud every second would drown everything else
    say(`${said} ${hope} in ${left} seconds.`);
    this.timer = setInterval(() => {
      left--;
      draw();
      if (left > 0) return;
      clearInterval(this.timer);
      if (chosen) go();
    }, 1000);
  }

  /** The server is gone: look for it until it is back.
   * @param {string} said @param {() => void} back called when it is */
  async lost(said, back) {
    this.show("lost", `${said} Looking for it …`);
    this.box.setAttribute("role", "alert");
    const { turn } = this;
    for (let wait = 500; turn === this.turn; wait = Math.min(wait * 1.5, 5000)) {
      await new Promise((resolve) => setTimeout(resolve, wait));
      if (turn !== this.turn || !(await alive())) continue;
      if (turn !== this.turn) return;
      this.show("found", "The server is back.", [["Dismiss", () => this.hide()]]);
      back();
    }
  }
}
