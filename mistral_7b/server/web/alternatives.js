/**
 * The list of a token's alternatives, shown at the pointer or the focus. Choosing one branches the conversation.
 *
 * Tab reaches one token of each answer. From there the left and right arrows move along the tokens, Enter or Arrow
 * down moves into the list, and Escape moves back.
 */

import { icon, make, the } from "./dom.js";

/** @typedef {import("./tree.js").Token} Token */

/** @param {number} logprob */
export function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100%" : p >= 10 ? `${p.toFixed(0)}%` : p >= 0.1 ? `${p.toFixed(1)}%` : "<0.1%";
}

/** A token's text with visible whitespace.
 * @param {Token} token */
export function visible(token) {
  if (token.t === "") return "(end)";
  return token.t.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

export class Alternatives {
  /** @param {(message: string, token: number, alternative: number) => void} choose */
  constructor(choose) {
    this.choose = choose;
    this.box = the("alternatives");
    /** @type {HTMLElement | null} */
    this.at = null;
    /** The answer's element; a streaming answer redraws the token in it. @type {HTMLElement | null} */
    this.root = null;
    this.timer = 0;
    this.coming = 0;
    this.box.addEventListener("pointerenter", () => clearTimeout(this.timer));
    this.box.addEventListener("pointerleave", () => this.hideSoon());
    this.box.addEventListener("keydown", (/** @type {KeyboardEvent} */ e) => this.#keyInside(e));
    this.box.addEventListener("focusout", (/** @type {FocusEvent} */ e) => {
      if (!this.box.contains(/** @type {Node} */ (e.relatedTarget)) && e.relatedTarget !== this.at) this.hide();
    });
    the("scroll").addEventListener("scroll", () => this.hide(), { passive: true });
    document.addEventListener("pointerdown", ({ target }) => {
      const inside = this.box.contains(/** @type {Node} */ (target)) || this.at?.contains(/** @type {Node} */ (target));
      if (!inside) this.hide(); // touch sends no pointerleave as a mouse does
    });
  }

  /** Watch an answer's tokens.
   * @param {HTMLElement} root @param {string} id the message's
   * @param {() => Token[]} tokens @param {() => boolean} ready whether the list may open */
  watch(root, id, tokens, ready) {
    /** @param {Event} event @returns {HTMLElement | null} */
    const tokenOf = (event) => /** @type {HTMLElement} */ (event.target).closest(".tok");
    const show = (/** @type {HTMLElement | null} */ token) => {
      if (token && ready()) this.show(token, root, id, tokens()[Number(token.dataset.i)]);
    };
    let pointed = -1;
    const point = (/** @type {HTMLElement | null} */ token) => {
      const i = token ? Number(token.dataset.i) : -1;
      if (i === pointed) return; // the same token, possibly redrawn
      clearTimeout(this.coming); // a pointer that only passes by does not open the list
      if (pointed >= 0) this.hideSoon();
      pointed = i;
      if (token) this.coming = setTimeout(() => show(token.isConnected ? token : drawn(root, i)), 110);
    };
    root.addEventListener("pointerover", (event) => point(tokenOf(event)));
    root.addEventListener("pointerleave", () => point(null));
    root.addEventListener("click", (event) => show(tokenOf(event)));
    root.addEventListener("focusin", (event) => show(tokenOf(event)));
    root.addEventListener("keydown", (event) => this.#keyOnToken(event, root));
    root.addEventListener("focusout", (event) => {
      if (!this.box.contains(/** @type {Node} */ (event.relatedTarget))) this.hideSoon();
    });
  }

  /** Make one token of an answer reachable with Tab.
   * @param {HTMLElement} root @param {(i: number) => Token | undefined} tokens */
  static reach(root, tokens) {
    const token = /** @type {HTMLElement | null} */ (root.querySelector(".tok"));
    if (token && !root.querySelector(".tok[tabindex]")) makeStop(token, tokens(Number(token.dataset.i)) ?? null);
  }

  get open() {
    return !this.box.hidden;
  }

  /** @param {HTMLElement} at @param {HTMLElement} root @param {string} id @param {Token | undefined} token */
  show(at, root, id, token) {
    clearTimeout(this.timer);
    if (!token || (this.at === at && !this.box.hidden)) return;
    this.at?.classList.remove("open");
    this.at = at;
    this.root = root;
    at.classList.add("open");
    const i = Number(at.dataset.i);
    const others = token.a ?? [];
    const taken = others.findIndex((other) => other.t === token.t && other.p === token.p);
    const rows = others.map((other, k) => this.#row(other, k === taken, () => this.choose(id, i, k)));
    if (taken < 0) rows.push(this.#row(token, true, () => {}));
    this.box.replaceChildren(...rows);
    this.box.hidden = false;
    this.#put();
  }

  /** @param {Token} token @param {boolean} taken @param {() => void} choose */
  #row(token, taken, choose) {
    const bar = make("span", { class: "chance" });
    bar.style.setProperty("--share", `${100 * Math.exp(token.p)}%`);
    return make(
      "button",
      {
        type: "button",
        role: "menuitem",
        tabindex: "-1",
        class: taken ? "taken" : "",
        "aria-disabled": taken || null,
        onclick: () => {
          if (taken) return;
          this.hide();
          choose();
        },
      },
      make("span", { class: "what", "aria-hidden": "true", text: visible(token) }),
      make("span", {
        class: "unseen",
        text: `${token.t.trim() || visible(token)}${taken ? ", chosen" : ""}, `,
      }),
      taken ? icon("check") : "",
      make("span", { class: "share", text: percent(token.p) }),
      bar,
    );
  }

  /** Place the list below the token, or above it if there is no room. */
  #put() {
    if (!this.at) return;
    const token = this.at.getClientRects()[0] ?? this.at.getBoundingClientRect();
    const box = this.box.getBoundingClientRect();
    const left = Math.max(8, Math.min(token.left - 8, innerWidth - box.width - 8));
    const under = token.bottom + 4;
    this.box.style.left = `${left}px`;
    this.box.style.top = `${under + box.height < innerHeight - 8 ? under : Math.max(8, token.top - box.height - 4)}px`;
  }

  hideSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (!this.box.contains(document.activeElement)) this.hide();
    }, 220);
  }

  hide() {
    clearTimeout(this.timer);
    this.at?.classList.remove("open");
    this.box.hidden = true;
  }

  /** Keep the list open at a token that was redrawn; close it if the token is gone. */
  follow() {
    if (!this.open || !this.at || this.at.isConnected) return;
    const again = this.root?.isConnected ? drawn(this.root, Number(this.at.dataset.i)) : null;
    if (!again) return this.hide();
    this.at = again;
    again.classList.add("open");
    this.#put();
  }

  /** @param {KeyboardEvent} event @param {HTMLElement} root */
  #keyOnToken(event, root) {
    const token = /** @type {HTMLElement} */ (event.target);
    if (!token.classList.contains("tok")) return;
    const all = /** @type {HTMLElement[]} */ ([...root.querySelectorAll(".tok")]);
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) {
      const next = all[all.indexOf(token) + by];
      if (next) {
        token.removeAttribute("tabindex");
        token.removeAttribute("role");
        token.removeAttribute("aria-label");
        token.removeAttribute("aria-haspopup");
        makeStop(next, null);
        next.focus();
      }
    } else if (event.key === "Enter" || event.key === "ArrowDown" || event.key === " ") {
      this.box.querySelector("button:not(.taken)")?.focus();
    } else if (event.key === "Escape" && !this.box.hidden) {
      this.hide();
      event.stopPropagation();
    } else {
      return;
    }
    event.preventDefault();
  }

  /** @param {KeyboardEvent} event */
  #keyInside(event) {
    const rows = [...this.box.querySelectorAll("button")];
    const at = rows.indexOf(document.activeElement);
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by) rows.at((at + by) % rows.length)?.focus();
    else if (event.key === "Home") rows[0]?.focus();
    else if (event.key === "End") rows.at(-1)?.focus();
    else if (event.key === "Escape" || event.key === "Tab") {
      this.at?.focus();
      if (event.key === "Tab") return;
      this.hide();
      event.stopPropagation();
    } else return;
    event.preventDefault();
  }
}

/** @param {HTMLElement} root @param {number} i @returns {HTMLElement | null} */
function drawn(root, i) {
  return root.querySelector(`.tok[data-i="${i}"]`);
}

/** @param {HTMLElement} element @param {Token | null} token */
function makeStop(element, token) {
  element.tabIndex = 0;
  element.setAttribute("role", "button");
  element.setAttribute("aria-haspopup", "menu");
  const text = token ? token.t.trim() : element.textContent?.trim();
  element.setAttribute(
    "aria-label",
    `${text || "whitespace"}: token, arrow keys move along the tokens, Enter opens the alternatives`,
  );
}
