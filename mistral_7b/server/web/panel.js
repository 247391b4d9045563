/** The settings panel: each field shows its default as a placeholder, and its error message. */

import { iconButton, make } from "./dom.js";
import { NUMBERS, fault } from "./settings.js";

/** @typedef {import("./settings.js").Settings} Settings */

const TOOLS_EXAMPLE = `[{"name": "weather",
  "description": "Weather of a city",
  "parameters": {"type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"]}}]`;
const SCHEMA_EXAMPLE = `{"type": "object",
  "properties": {"name": {"type": "string"}},
  "required": ["name"]}`;

export class Panel {
  /** @param {HTMLElement} root @param {HTMLButtonElement} opener
   * @param {(settings: Settings) => void} changed */
  constructor(root, opener, changed) {
    this.root = root;
    this.opener = opener;
    this.changed = changed;
    /** @type {Settings} */
    this.settings = {};
    opener.addEventListener("click", () => this.open(this.root.hidden === true));
    root.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.open(false);
    });
    this.#draw();
  }

  /** @param {boolean} open */
  open(open) {
    this.root.hidden = !open;
    this.opener.setAttribute("aria-expanded", String(open));
    document.body.classList.toggle("panel-open", open);
    if (open) this.root.querySelector("textarea")?.focus();
    else this.opener.focus();
  }

  /** Show these settings.
   * @param {Settings} settings */
  show(settings) {
    this.settings = { ...settings };
    for (const input of this.#inputs()) {
      input.value = this.settings[input.name] ?? "";
      this.#check(input);
    }
    this.#follow();
  }

  /** Show a model's own defaults as placeholders. The token limit is this page's.
   * @param {Record<string, number>} defaults */
  usual(defaults) {
    for (const { name, usual } of NUMBERS) {
      const value = name === "max_tokens" ? usual : String(defaults[name] ?? usual);
      /** @type {HTMLInputElement} */ (this.root.querySelector(`#set-${name}`)).placeholder = value;
    }
  }

  /** Show settings changed in another tab, unless the panel has the focus.
   * @param {Settings} settings */
  follow(settings) {
    if (!this.root.contains(document.activeElement)) this.show(settings);
  }

  /** @returns {NodeListOf<HTMLInputElement>} */
  #inputs() {
    return this.root.querySelectorAll("[name]");
  }

  #draw() {
    const reset = make(
      "button",
      { type: "button", class: "quiet", onclick: () => this.#reset() },
      "Reset to defaults",
    );
    this.schema = this.#field(
      "schema",
      "JSON schema",
      make("textarea", { rows: 7, spellcheck: "false", placeholder: SCHEMA_EXAMPLE, class: "mono" }),
    );
    this.root.replaceChildren(
      make(
        "div",
        { class: "panel-head" },
        make("h2", { text: "Settings" }),
        iconButton("close", "Close settings", () => this.open(false)),
      ),
      make("dl", { id: "about", "aria-label": "Model" }),
      this.#field("system", "System prompt", make("textarea", { rows: 4, placeholder: "None" })),
      make("h3", { text: "Sampling" }),
      make(
        "div",
        { class: "numbers" },
        ...NUMBERS.map((f) =>
          this.#field(
            f.name,
            f.label,
            make("input", { inputmode: "decimal", placeholder: f.usual, autocomplete: "off" }),
            f.hint,
          ),
        ),
      ),
      this.#field(
        "stop",
        "Stop strings",
        make("textarea", { rows: 2, placeholder: "None", spellcheck: "false" }),
        "one per line",
      ),
      make("h3", { text: "Answer" }),
      this.#field(
        "format",
        "Format",
        make(
          "select",
          {},
          make("option", { value: "", text: "Text (default)" }),
          make("option", { value: "json", text: "Any JSON object" }),
          make("option", { value: "schema", text: "JSON schema" }),
        ),
      ),
      this.schema,
      this.#field(
        "shown",
        "Display",
        make(
          "select",
          {},
          make("option", { value: "", text: "Automatic (default)" }),
          make("option", { value: "markdown", text: "Markdown" }),
          make("option", { value: "plain", text: "Plain text" }),
        ),
        "automatic: Markdown, or plain text for a base model",
      ),
      make("h3", { text: "Tools" }),
      this.#field(
        "tools",
        "Functions",
        make("textarea", { rows: 7, spellcheck: "false", placeholder: TOOLS_EXAMPLE, class: "mono" }),
        "a JSON list",
      ),
      this.#field(
        "tool_choice",
        "Tool choice",
        make(
          "select",
          {},
          make("option", { value: "", text: "Automatic (default)" }),
          make("option", { value: "required", text: "Required" }),
          make("option", { value: "none", text: "None" }),
        ),
      ),
      reset,
    );
    this.root.addEventListener("input", (event) => this.#take(/** @type {HTMLInputElement} */ (event.target)));
    this.#follow();
  }

  /** @param {string} name @param {string} label @param {HTMLInputElement} input @param {string} [hint] */
  #field(name, label, input, hint) {
    input.name = name;
    input.id = `set-${name}`;
    input.setAttribute("aria-describedby", `about-${name}`);
    return make(
      "div",
      { class: "field" },
      make("label", { for: input.id, text: label }),
      input,
      make("span", { class: "hint", id: `about-${name}`, text: hint ?? "", data: { hint: hint ?? "" } }),
    );
  }

  /** @param {HTMLInputElement} input */
  #take(input) {
    this.settings = { ...this.settings, [input.name]: input.value };
    if (!input.value) delete this.settings[input.name];
    this.#check(input);
    this.#follow();
    this.changed(this.settings);
  }

  /** @param {HTMLInputElement} input */
  #check(input) {
    const wrong =
      input.name === "schema" && this.settings.format !== "schema" ? "" : fault(input.name, input.value);
    const about = /** @type {HTMLElement} */ (this.root.querySelector(`#about-${input.name}`));
    input.setAttribute("aria-invalid", String(Boolean(wrong)));
    about.textContent = wrong || (about.dataset.hint ?? "");
    about.classList.toggle("wrong", Boolean(wrong));
  }

  /** Show the schema field only if the format uses it. */
  #follow() {
    if (this.schema) this.schema.hidden = this.settings.format !== "schema";
    const schema = [...this.#inputs()].find((input) => input.name === "schema");
    if (schema) this.#check(schema);
  }

  #reset() {
    this.show({});
    this.changed({});
  }
}
