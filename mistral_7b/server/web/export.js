/** The dialog that exports one conversation or all, in the format that the user chooses. */

import { make, the } from "./dom.js";
import { preferences, ratings } from "./feedback.js";
import { jsonOf, markdownOf, save } from "./transfer.js";

/** @typedef {import("./tree.js").Tree} Tree */

/** One JSON object on each line, without repetitions.
 * @param {(tree: Tree) => Record<string, any>[]} rowsOf @returns {(trees: Tree[]) => string} */
function lines(rowsOf) {
  return (trees) => [...new Set(trees.flatMap(rowsOf).map((row) => `${JSON.stringify(row)}\n`))].join("");
}

/** `write` returns "" if there is nothing to export, for the reason that `none` gives.
 * @type {{name: string, hint: string, suffix: string, write: (trees: Tree[]) => string, none?: string}[]} */
const FORMATS = [
  { name: "Conversations", hint: "JSON with all versions, to import again", suffix: "json", write: jsonOf },
  {
    name: "Text",
    hint: "Markdown with the visible versions",
    suffix: "md",
    write: (trees) => trees.map(markdownOf).join("\n"),
  },
  {
    name: "Ratings",
    hint: "JSONL to train with KTO: answers with a thumb up or down",
    suffix: "ratings.jsonl",
    write: lines(ratings),
    none: "Nothing to export: no complete answer has a thumb up, and no answer a thumb down.",
  },
  {
    name: "Preferences",
    hint: "JSONL to train with DPO: preferred and other versions of answers",
    suffix: "preferences.jsonl",
    write: lines(preferences),
    none: "Nothing to export: no answer with several versions has one that was rated good, edited or continued.",
  },
];

/** @param {string | undefined} title of the only conversation @param {() => Promise<Tree[]>} read */
export function offerExport(title, read) {
  const dialog = the("export-dialog");
  const note = the("export-note");
  const tell = (/** @type {string} */ text) => {
    note.textContent = text;
    note.scrollIntoView({ block: "nearest" }); // the dialog may be higher than the screen
  };
  const write = async (/** @type {typeof FORMATS[number]} */ format) => {
    try {
      const trees = await read();
      const text = format.write(trees);
      if (!text) return tell(format.none ?? "");
      save(trees, text, format.suffix);
      dialog.close();
    } catch (error) {
      tell(/** @type {Error} */ (error).message);
    }
  };
  const buttons = FORMATS.map((format) =>
    make(
      "button",
      { type: "button", class: "starter", onclick: () => write(format) },
      make("strong", { text: format.name }),
      make("span", { text: format.hint }),
    ),
  );
  the("export-title").textContent = title ? `Export “${title}”` : "Export all conversations";
  the("formats").replaceChildren(...buttons);
  note.textContent = "";
  dialog.showModal();
}
