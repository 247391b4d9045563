/** The empty conversation: the model in use, a notice for a base model, and prompts to start with. */

import { make, the } from "./dom.js";

/** @typedef {import("./models.js").Picker} Picker */

const QUESTIONS = [
  ["Explain a concept", "Explain sliding window attention to a programmer, with a small example."],
  ["Write a function", "Write a Python function that merges two sorted lists, with a docstring and tests."],
  ["Derive a formula", "Derive the gradient of the softmax function. Write the formulas in LaTeX."],
  ["Compare in a table", "Compare float16, bfloat16 and int8 in a table: range, precision, and use."],
];
const BEGINNINGS = [
  ["A function", 'def is_prime(n: int) -> bool:\n    """Whether n is a prime number."""\n'],
  ["A class", 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self):\n'],
  ["A script", 'import argparse\n\n\ndef main() -> None:\n    """Count the words of a file."""\n'],
  ["A test", "import unittest\n\n\nclass TestSorting(unittest.TestCase):\n    def test_empty(self):\n"],
];

export const BASE_NOTICE =
  "This is a base model: it continues a text, and was not trained to answer questions. Write the beginning of a " +
  "text or of code. Answers are shown as plain text; change this under Settings, Display.";

const NO_TEMPLATE = " For conversations, start the server with --chat-template.";

export class Welcome {
  /** @param {Picker} picker @param {(text: string) => void} use puts a prompt into the message box */
  constructor(picker, use) {
    this.picker = picker;
    this.use = use;
    this.drawn = "";
  }

  /** Redraw for the chosen model. */
  draw() {
    const { picker } = this;
    const facts = picker.facts();
    const { isBase, lacksTemplate } = picker;
    const drawn = JSON.stringify([facts, isBase, lacksTemplate]);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    the("facts").textContent = facts.map(([, , words]) => words).filter(Boolean).join(" · ");
    the("base").hidden = !isBase;
    the("base").textContent = isBase ? BASE_NOTICE + (lacksTemplate ? NO_TEMPLATE : "") : "";
    the("starters").replaceChildren(
      ...(isBase ? BEGINNINGS : QUESTIONS).map(([name, text]) =>
        make(
          "button",
          { type: "button", class: "starter", onclick: () => this.use(text) },
          make("strong", { text: name }),
          make("span", { class: isBase ? "mono" : "", text: text.trim().split("\n")[0] }),
        ),
      ),
    );
    the("about").replaceChildren(
      ...facts.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))),
    );
  }
}
