/** The banner for problems that prevent requests: no connection, a full queue, a missing key. */

import { alive } from "./api.js";
import { make, say, the } from "./dom.js";

export class Banner {
  constructor() {
    this.box = the("banner");
    this.timer = 0;
    this.kind = "";
    this.turn = 0; // changes with each banner: ends the loop of one that was replaced
  }

  /** Hide the banner if it shows one of these kinds of problems, which no longer exists.
   * @param {...string} kinds */
  over(...kinds) {
    if (kinds.includes(this.kind)) this.hide();
  }

  hide() {
    this.turn++;
    this.kind = "";
    clearInterval(this.timer);
    this.box.hidden = true;
  }

  /** @param {string} kind @param {string} text @param {[string, () => void][]} [buttons] labels and actions */
  show(kind, text, buttons = []) {
    this.hide();
    this.kind = kind;
    this.box.className = kind;
    this.words = make("span", { text });
    this.box.replaceChildren(
      make("i", { class: "dot" }),
      this.words,
      ...buttons.map(([label, action]) => make("button", { type: "button", onclick: action }, label)),
    );
    this.box.hidden = false;
  }

  /** The queue is full: count down, and retry only if the user chooses to.
   * @param {string} said @param {string} hope what to expect after the countdown
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
        "Retry automatically",
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
        left <= 0 ? `${said} ${hope} now.` : `${said} ${chosen ? "Retrying" : hope} in ${left} s.`;
    };
    draw();
    this.box.setAttribute("role", "group"); // not an alert: screen readers would announce each second
    say(`${said} ${hope} in ${left} seconds.`);
    this.timer = setInterval(() => {
      left--;
      draw();
      if (left > 0) return;
      clearInterval(this.timer);
      if (chosen) go();
    }, 1000);
  }

  /** The connection is lost: poll the server until it responds.
   * @param {string} said @param {() => void} back called when the server responds */
  async lost(said, back) {
    this.show("lost", `${said} Reconnecting …`);
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
