/**
 * Training data from what was corrected while chatting: rated answers for KTO, and pairs of versions for DPO.
 *
 *     What is 2 + 2? ── 5.                      rejected
 *                    └─ 4. ── And 3 + 3?        chosen: it was continued
 */

import { fault, messagesOf, sent, toolsOf } from "./settings.js";

/** @typedef {import("./tree.js").Tree} Tree @typedef {import("./tree.js").Message} Message */
/** @typedef {Record<string, any>} Row */

/** A row for each rated answer: its prompt, the answer as `completion`, and the rating as `label`.
 * @param {Tree} tree @returns {Row[]} */
export function ratings(tree) {
  const rated = [...tree.messages.values()].filter((m) => counts(m) && m.good !== undefined);
  return rated.map((m) => ({ ...contextOf(tree, m), completion: sent(m), label: m.good }));
}

/** A row for each version of an answer to which another is preferred: their prompt, `chosen` and `rejected`.
 * @param {Tree} tree @returns {Row[]} */
export function preferences(tree) {
  return [...tree.children.values()].flatMap((ids) => {
    const versions = ids.map((id) => tree.get(id)).filter(counts);
    const ranked = versions.map((m) => ({ rank: rankOf(m, versions, tree), said: sent(m) }));
    const best = Math.max(1, ...ranked.map((version) => version.rank));
    const rejected = ranked.filter((version) => version.rank < best).map((version) => version.said);
    const chosen = ranked.filter((version) => version.rank === best).map((version) => version.said);
    return chosen.flatMap((good) =>
      rejected
        .filter((bad) => JSON.stringify(bad) !== JSON.stringify(good)) // as without randomness
        .map((bad) => ({ ...contextOf(tree, versions[0]), chosen: good, rejected: bad })),
    );
  });
}

/** Whether an answer can be learned from: it is complete, or a text that was rated as bad.
 * @param {Message} message */
function counts({ role, state, content, calls, good }) {
  if (role !== "assistant") return false;
  if (calls?.length) return state === "done"; // else the arguments may be incomplete
  return Boolean(content.trim()) && (state === "done" || good === false);
}

/** How much an answer is preferred: what was said of it counts more than what was done with it.
 * @param {Message} message @param {Message[]} versions @param {Tree} tree */
function rankOf(message, versions, tree) {
  if (message.good === false) return -1;
  if (versions.some((other) => other.corrects === message.id && other.good !== false)) return 0;
  if (message.good) return 3;
  if (message.corrects) return 2;
  return tree.children.has(message.id) ? 1 : 0;
}

/** What an answer answers, as in its request. Throws an Error if the conversation's tools are invalid.
 * @param {Tree} tree @param {Message} message @returns {Row} */
function contextOf(tree, message) {
  const { settings, title } = tree.conversation;
  const wrong = fault("tools", settings.tools ?? "");
  if (wrong) throw new Error(`The tools of “${title}” are invalid: ${wrong}.`);
  const tools = toolsOf(settings);
  return { prompt: messagesOf(tree.upTo(message.parent), settings), ...(tools?.length ? { tools } : {}) };
}
