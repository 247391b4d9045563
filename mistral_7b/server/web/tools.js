/** Cards for tool calls: each shows a call and takes its result as text. */

import { icon, make } from "./dom.js";

/** @typedef {import("./tree.js").Call} Call @typedef {{id: string, content: string}} Result */

/** @param {string} text JSON, possibly truncated */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Draw the calls. With `send`, results can be edited and sent; earlier results are filled in.
 * @param {HTMLElement} root @param {Call[]} calls @param {Result[] | undefined} results
 * @param {((results: Result[]) => void) | null} send @param {Node | null} versions buttons to switch results */
export function drawCalls(root, calls, results, send, versions) {
  const typed = new Map([...root.querySelectorAll("textarea")].map((area) => [area.dataset.id, area.value]));
  const areas = /** @type {HTMLTextAreaElement[]} */ ([]);
  const cards = calls.map((call, i) => {
    const before = results?.find((r) => r.id === call.id)?.content;
    const area = make("textarea", {
      rows: 2,
      data: { id: call.id },
      spellcheck: "false",
      readonly: !send,
      id: `result-${call.id || i}`,
    });
    area.value = typed.get(call.id) ?? before ?? "";
    areas.push(area);
    return make(
      "section",
      { class: "card", "aria-label": `Call of ${call.name}` },
      make(
        "div",
        { class: "card-head" },
        icon("tool"),
        make("strong", { text: call.name || "…" }),
        make("code", { text: call.id }),
      ),
      make("pre", { tabindex: "0", role: "region", "aria-label": "Arguments", text: pretty(call.arguments) }),
      send || before !== undefined ? make("label", { for: area.id }, make("span", { text: "Result" }), area) : "",
    );
  });
  const button =
    send &&
    make(
      "button",
      {
        type: "button",
        class: "main",
        onclick: () => send(calls.map((call, i) => ({ id: call.id, content: areas[i].value }))),
      },
      results ? "Send new results" : calls.length > 1 ? "Send results" : "Send result",
    );
  if (button) {
    const check = () => {
      button.disabled = areas.some((area) => !area.value.trim());
    };
    for (const area of areas) area.addEventListener("input", check);
    check();
  }
  root.replaceChildren(
    ...cards,
    ...(button && calls.length ? [make("div", { class: "buttons" }, versions, button)] : []),
  );
}
