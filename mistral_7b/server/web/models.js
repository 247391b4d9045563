/** The selection of models and adapters, and the gauge of the context. */

import { models } from "./api.js";
import { make, the } from "./dom.js";
import { keep, kept } from "./storage.js";

/** @typedef {import("./api.js").Model} Model @typedef {import("./tree.js").Message} Message */

export class Picker {
  /** @param {() => void} changed called when the list has loaded, and when another model is chosen */
  constructor(changed) {
    this.changed = changed;
    this.select = the("model");
    /** @type {Model[]} */
    this.models = [];
    this.select.addEventListener("change", () => {
      keep("model", this.select.value);
      changed();
    });
  }

  /** The selected model's name for requests. */
  get chosen() {
    return this.models.length ? this.select.value : "";
  }

  /** The context length in tokens; undefined if the server does not report it. */
  get context() {
    const model = this.models.find((m) => m.id === this.chosen);
    return model?.max_model_len ?? this.models[0]?.max_model_len;
  }

  /** Whether the chosen model is a base model. An adapter of one may be trained for conversations. */
  get isBase() {
    return this.plain(this.chosen);
  }

  /** Whether answers of a model are plain text or code rather than Markdown.
   * @param {string | undefined} name */
  plain(name) {
    const model = this.models.find((m) => m.id === name);
    return model?.chat_template === false && !model.parent;
  }

  /** Whether the server has no chat template for the chosen model: it completes texts only. */
  get lacksTemplate() {
    const model = this.models.find((m) => m.id === this.chosen);
    return model?.tokenizer !== undefined && !model.tokenizer?.chat;
  }

  /** The chosen model's own sampling defaults, by field. */
  get defaults() {
    return this.models.find((m) => m.id === this.chosen)?.sampling_defaults ?? {};
  }

  /** What is known about the chosen model: names, values, and the main ones in words.
   * @returns {[string, string, string][]} */
  facts() {
    const model = this.models.find((m) => m.id === this.chosen);
    if (!model) return [];
    const { context } = this;
    const base = this.models.find((m) => m.id === model.parent) ?? model;
    const tokens = context && `${context.toLocaleString("en")} tokens`;
    const kind = this.isBase ? "base model" : model.chat_template && !model.parent ? "chat model" : "";
    return /** @type {[string, string, string][]} */ (
      [
        ["Name", model.id, model.id],
        ["Adapter of", model.parent, `adapter of ${model.parent}`],
        ["Kind", kind, kind],
        ["Context", tokens, `context of ${tokens}`],
        ["Weights", base.precision, `${base.precision} weights`],
        ...words(base.tokenizer).map(([name, value]) => [name, value, ""]),
      ].filter(([, value]) => value)
    );
  }

  /** Load the list of models from the server. Throws a Problem. */
  async load() {
    this.models = await models();
    const name = (/** @type {Model} */ m) => make("option", { value: m.id, text: m.id });
    const adapters = this.models.filter((m) => m.parent);
    this.select.replaceChildren(...this.models.filter((m) => !m.parent).map(name));
    if (adapters.length) this.select.append(make("optgroup", { label: "Adapters" }, ...adapters.map(name)));
    const before = kept("model");
    if (this.models.some((m) => m.id === before)) this.select.value = before;
    this.select.disabled = this.models.length < 2;
    this.select.classList.toggle("only", this.models.length < 2);
    this.changed();
  }

  /** Show that no list could be loaded. @param {string} why */
  unknown(why) {
    if (this.models.length) return; // keep the list: the server is likely to return
    this.select.replaceChildren(make("option", { text: why }));
    this.select.disabled = true;
  }

  /** Show the share of the context in use, as of the last answer.
   * @param {Message[]} path */
  gauge(path) {
    const usage = path.findLast((m) => m.usage)?.usage;
    const used = usage ? usage.prompt_tokens + usage.completion_tokens : 0;
    the("gauge").hidden = !used;
    if (!used) return;
    const { context } = this;
    const share = context ? Math.min(1, used / context) : 0;
    the("gauge").querySelector(".bar").hidden = !context;
    the("gauge").querySelector(".bar > span").style.width = `${100 * share}%`;
    the("gauge").classList.toggle("near", share > 0.85);
    const number = (/** @type {number} */ n) => n.toLocaleString("en");
    the("context").textContent = context
      ? `${number(used)} of ${number(context)} tokens`
      : `${number(used)} tokens`;
  }
}

/** A tokenizer in words: names and values.
 * @param {import("./api.js").Tokenizer | null | undefined} tokenizer @returns {[string, string][]} */
function words(tokenizer) {
  if (!tokenizer) return [];
  const { chat } = tokenizer;
  const can = (/** @type {boolean} */ able, /** @type {string} */ what) => (able ? what : `no ${what}`);
  return [
    ["Tokenizer", `${tokenizer.kind} (${tokenizer.file}), ${tokenizer.vocab_size.toLocaleString("en")} tokens`],
    [
      "Chat template",
      chat ? `${chat.name}; ${can(chat.tools, "tools")}, ${can(chat.system, "system messages")}` : "none",
    ],
    ["Ends", tokenizer.ends.map((end) => `${end.token} (${end.id})`).join(", ")],
  ];
}
