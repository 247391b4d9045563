/** The selection of models and adapters, and the gauge of the context. */

import { models } from "./api.js";
import { make, the } from "./dom.js";
import { keep, kept } from "./storage.js";

/** @typedef {import("./api.js").Model} Model @typedef {import("./tree.js").Message} Message */

export class Picker {
  constructor() {
    this.select = the("model");
    /** @type {Model[]} */
    this.models = [];
    this.select.addEventListener("change", () => keep("model", this.select.value));
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
