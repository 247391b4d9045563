/** Conversations as files: JSON, which can be imported again, and Markdown. */

import { make } from "./dom.js";
import { texts } from "./settings.js";
import { newId } from "./tree.js";

/** @typedef {import("./tree.js").Tree} Tree */
/** @typedef {import("./tree.js").Conversation} Conversation @typedef {import("./tree.js").Message} Message */

const FORMAT = "mistral-7b conversations";

/** Download conversations as a JSON file.
 * @param {Tree[]} trees */
export function exportAll(trees) {
  save(trees, jsonOf(trees), "json");
}

/** Download a text about conversations, named after the only one.
 * @param {Tree[]} trees @param {string} text @param {string} suffix */
export function save(trees, text, suffix) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/octet-stream" }));
  const title = trees.length === 1 ? trees[0].conversation.title : "conversations";
  const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  make("a", { href: url, download: `${name || "conversation"}.${suffix}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** @param {Tree[]} trees @returns {string} */
export function jsonOf(trees) {
  const conversations = trees.map((tree) => ({ ...tree.conversation, messages: [...tree.messages.values()] }));
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The visible versions of a conversation. @param {Tree} tree @returns {string} */
export function markdownOf(tree) {
  const { title, settings } = tree.conversation;
  const parts = [`# ${title}`];
  if (settings.system?.trim()) parts.push("## System prompt", settings.system.trim());
  for (const message of tree.path()) {
    const { role, content, model, calls = [], results = [] } = message;
    if (role === "user") parts.push("## You", content.trim());
    if (role === "assistant") parts.push(model ? `## Answer of ${model}` : "## Answer", content.trim());
    for (const call of calls) parts.push(`Call of \`${call.name}\`:`, fenced(call.arguments, "json"));
    for (const result of results) parts.push("Result:", fenced(result.content));
  }
  return `${parts.filter(Boolean).join("\n\n")}\n`;
}

/** A Markdown code block, whose fence is longer than any run of backticks in the text.
 * @param {string} text @param {string} [language] */
export function fenced(text, language = "") {
  const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${text.replace(/\n$/, "")}\n${fence}`;
}

/** Parse and check an exported file. Conversations get new ids, so that an import overwrites nothing. Throws an Error.
 * @param {string} text
 * @returns {{conversation: Conversation, messages: Message[]}[]} */
export function readExport(text) {
  const file = parsed(text);
  if (file?.format !== FORMAT || !Array.isArray(file.conversations))
    throw new Error("the file is not an export of this page");
  if (file.version !== 1) throw new Error(`the file has version ${file.version}, but this page reads version 1`);
  return file.conversations.map(readOne);
}

/** @param {string} text @returns {any} */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("the file is not valid JSON");
  }
}

/** @param {any} from @returns {{conversation: Conversation, messages: Message[]}} */
function readOne(from) {
  if (!Array.isArray(from?.messages)) throw new Error("a conversation has no messages");
  const conversation = {
    id: newId(),
    title: text(from.title, "title"),
    created: number(from.created),
    updated: number(from.updated),
    chosen: /** @type {Record<string, string>} */ ({}),
    settings: texts(record(from.settings)),
  };
  for (const message of from.messages)
    if (message !== record(message)) throw new Error("a message is not an object");
  const ids = new Map(from.messages.map((/** @type {any} */ m) => [text(m.id, "id"), newId()]));
  if (ids.size < from.messages.length) throw new Error("two messages have the same id");
  const messages = from.messages.map((/** @type {any} */ m) => readMessage(m, ids, conversation.id));
  for (const [parent, child] of Object.entries(record(from.chosen))) {
    const [under, id] = [parent === "" ? "" : ids.get(parent), ids.get(String(child))];
    if (under !== undefined && id !== undefined) conversation.chosen[under] = id;
  }
  for (const message of messages) refuseLoops(message, new Map(messages.map((/** @type {any} */ m) => [m.id, m])));
  return { conversation, messages };
}

/** @param {any} m @param {Map<string, string>} ids @param {string} conversation @returns {Message} */
function readMessage(m, ids, conversation) {
  if (!["user", "assistant", "tool"].includes(m.role)) throw new Error(`a message has the role ${m.role}`);
  if (m.parent !== null && !ids.has(m.parent)) throw new Error("a message's parent is missing");
  return {
    id: ids.get(m.id) ?? "",
    conversation,
    parent: m.parent === null ? null : (ids.get(m.parent) ?? null),
    role: m.role,
    content: text(m.content, "content"),
    created: number(m.created),
    given: Math.max(0, number(m.given)),
    tokens: list(m.tokens).map((t) => ({ ...alternative(t), a: list(t.a).map(alternative) })),
    calls: list(m.calls).map((c) => ({
      id: text(c.id, "id"),
      name: text(c.name, "name"),
      arguments: text(c.arguments, "arguments"),
    })),
    results: list(m.results).map((r) => ({ id: text(r.id, "id"), content: text(r.content, "content") })),
    state:
      m.role !== "assistant"
        ? undefined
        : ["done", "length", "stopped", "cut", "full", "failed"].includes(m.state)
          ? m.state
          : "cut",
    problem: m.problem === undefined ? undefined : text(m.problem, "problem"),
    model: m.model === undefined ? undefined : text(m.model, "model"),
    good: typeof m.good === "boolean" ? m.good : undefined,
    corrects: ids.get(m.corrects),
    usage:
      m.usage !== record(m.usage)
        ? undefined
        : {
            prompt_tokens: number(m.usage.prompt_tokens),
            completion_tokens: number(m.usage.completion_tokens),
          },
    first: m.first === undefined ? undefined : number(m.first),
    rate: m.rate === undefined ? undefined : number(m.rate),
  };
}

/** @param {Message} message @param {Map<string, Message>} all */
function refuseLoops(message, all) {
  let steps = 0;
  for (let at = message; at.parent !== null; at = /** @type {Message} */ (all.get(at.parent))) {
    if (++steps > all.size) throw new Error("the messages form a cycle");
  }
}

/** @param {any} t */
function alternative(t) {
  return { t: text(t.t, "token"), p: number(t.p), ...(t.b ? { b: list(t.b).map(number) } : {}) };
}

/** @param {any} value @param {string} what @returns {string} */
function text(value, what) {
  if (typeof value !== "string") throw new Error(`a ${what} is not a string`);
  return value;
}

/** @param {any} value @returns {number} */
function number(value) {
  return Number.isFinite(value) ? value : 0;
}

/** @param {any} value @returns {any[]} */
function list(value) {
  return Array.isArray(value) ? value : [];
}

/** @param {any} value @returns {Record<string, any>} */
function record(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value) ? value : {};
}
