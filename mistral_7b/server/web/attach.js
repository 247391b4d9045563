/** Text files in messages: chosen or dropped, put into the message as fenced text, and shown folded. */

import { icon, iconButton, make, say, the } from "./dom.js";
import { fenced } from "./transfer.js";

const MOST = 100_000; // bytes of all files of one message: more fills the context of most models

/** @typedef {{name: string, text: string}} Attached */

export class Attachments {
  /** @param {(problem: string) => void} refuse shows why files were refused; "" if all were accepted
   * @param {() => void} changed called after each change of the list */
  constructor(refuse, changed) {
    this.refuse = refuse;
    this.changed = changed;
    /** @type {Attached[]} */
    this.files = [];
    this.list = the("attached");
    const input = the("attach-file");
    the("attach").append(icon("clip"));
    the("attach").addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      await this.add([...input.files]);
      input.value = ""; // else choosing the same file again fires no event
      the("ask").focus();
    });
    this.#drops();
  }

  /** Accept files that are dropped anywhere on the page. */
  #drops() {
    const veil = the("drop");
    const carries = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      veil.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) veil.hidden = true; // the pointer has left the page
    });
    document.addEventListener("drop", (event) => {
      veil.hidden = true;
      if (!carries(event)) return;
      event.preventDefault();
      this.add([...(event.dataTransfer?.files ?? [])]);
    });
  }

  /** Attach files, or refuse them in words.
   * @param {File[]} files */
  async add(files) {
    const problems = [];
    for (const file of files) {
      const problem = await this.#take(file);
      if (problem) problems.push(problem);
    }
    this.refuse(problems.join(" "));
    this.#draw();
  }

  /** @param {File} file @returns {Promise<string>} why it was refused, or "" */
  async #take(file) {
    const name = file.name.replace(/[`\s]+/g, " ").trim() || "file";
    const used = this.files.reduce((sum, { text }) => sum + text.length, 0);
    if (file.size > MOST) return `${name} has ${size(file.size)}, and a message can hold files of ${size(MOST)}.`;
    if (used + file.size > MOST)
      return `${name} was not attached: the files of a message can have ${size(MOST)} together.`;
    let text = "";
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch (error) {
      return error instanceof TypeError ? binary(name) : `${name} could not be read.`;
    }
    if (text.includes("\0")) return binary(name);
    if (!text.trim()) return `${name} is empty.`;
    this.files.push({ name, text });
    say(`${name} attached`);
    return "";
  }

  #draw() {
    this.list.replaceChildren(
      ...this.files.map((file) =>
        make(
          "li",
          {},
          make("span", { text: file.name, dir: "auto" }),
          make("small", { text: size(file.text.length) }),
          iconButton("close", `Remove ${file.name}`, () => this.set(this.files.filter((f) => f !== file))),
        ),
      ),
    );
    this.list.hidden = !this.files.length;
    this.changed();
  }

  /** @param {Attached[]} files */
  set(files) {
    this.files = files;
    this.#draw();
  }

  /** The message of a text and the attached files.
   * @param {string} text */
  message(text) {
    const parts = this.files.map((file) => `File \`${file.name}\`:\n${fenced(file.text)}`);
    return [text.trimEnd(), ...parts].filter(Boolean).join("\n\n");
  }
}

const FILE = /(?:^|\n\n)File `([^`\n]+)`:\n(`{3,})\n([^]*?)\n\2(?=\n\n|$)/g;

/** Draw a user's message: its text, and its files folded.
 * @param {HTMLElement} root @param {string} content */
export function drawMessage(root, content) {
  /** @type {(Node | string)[]} */
  const parts = [];
  let from = 0;
  for (const { index, 0: whole, 1: name, 3: text } of content.matchAll(FILE)) {
    parts.push(content.slice(from, index));
    const head = make(
      "summary",
      {},
      icon("clip"),
      make("span", { text: name }),
      make("small", { text: size(text.length) }),
    );
    parts.push(
      make(
        "details",
        { class: "file" },
        head,
        make("pre", { text, dir: "ltr", tabindex: "0", role: "region", "aria-label": name }),
      ),
    );
    from = index + whole.length;
  }
  parts.push(content.slice(from).replace(/^\n\n/, ""));
  root.replaceChildren(...parts.filter(Boolean));
}

/** The title of a conversation that begins with this message.
 * @param {string} content */
export function titleOf(content) {
  const [line] = content.trim().split("\n");
  return (/^File `(.+)`:$/.exec(line)?.[1] ?? line).slice(0, 60);
}

/** @param {number} bytes */
function size(bytes) {
  return bytes < 1000 ? `${bytes} bytes` : `${(bytes / 1000).toFixed(bytes < 10_000 ? 1 : 0)} kB`;
}

/** @param {string} name */
function binary(name) {
  return `${name} is not a text file in UTF-8; only text can be attached.`;
}
