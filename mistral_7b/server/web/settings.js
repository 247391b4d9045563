/** The settings: fields, defaults, validation, and the request body built from them. */

/** @typedef {import("./tree.js").Message} Message */

/**
 * @typedef {{name: string, label: string, usual: string, min?: number, max?: number, step: number | "any",
 *   hint: string}} NumberField
 */

export const TOKEN_LIMIT = 1024; // per answer by default, so that each answer ends

/**
 * Numeric settings, with the server's field names. An empty field uses the server's default, or TOKEN_LIMIT.
 * @type {NumberField[]}
 */
export const NUMBERS = [
  {
    name: "temperature",
    label: "Temperature",
    usual: "1",
    min: 0,
    step: "any",
    hint: "0: always the most likely token",
  },
  {
    name: "top_p",
    label: "Top p",
    usual: "1",
    min: 0,
    max: 1,
    step: "any",
    hint: "likeliest tokens that sum to p",
  },
  { name: "top_k", label: "Top k", usual: "0", min: -1, step: 1, hint: "the k most likely tokens; 0: all" },
  { name: "min_p", label: "Min p", usual: "0", min: 0, max: 1, step: "any", hint: "at least p × top probability" },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    usual: "1",
    min: 0,
    step: "any",
    hint: "above 1: avoids tokens already used",
  },
  {
    name: "presence_penalty",
    label: "Presence penalty",
    usual: "0",
    min: -2,
    max: 2,
    step: "any",
    hint: "once for each token already used",
  },
  {
    name: "frequency_penalty",
    label: "Frequency penalty",
    usual: "0",
    min: -2,
    max: 2,
    step: "any",
    hint: "for each earlier use of a token",
  },
  { name: "max_tokens", label: "Token limit", usual: "1024", min: 1, step: 1, hint: "per answer" },
  { name: "seed", label: "Seed", usual: "random", step: 1, hint: "same seed, same answer" },
];

/**
 * The settings of a conversation: strings as they were typed; "" is the default.
 * @typedef {Record<string, string>} Settings
 */

/** Restore stored settings: drops values that are not strings; empty if the JSON is invalid.
 * @param {unknown} kept an object, or its JSON @returns {Settings} */
export function texts(kept) {
  try {
    const all = typeof kept === "string" ? JSON.parse(kept) : kept;
    return Object.fromEntries(Object.entries(all ?? {}).filter(([, value]) => typeof value === "string"));
  } catch {
    return {};
  }
}

/** The error message for a setting; "" if it is valid.
 * @param {string} name @param {string} value
 * @returns {string} */
export function fault(name, value) {
  const field = NUMBERS.find((f) => f.name === name);
  if (field) return numberFault(field, value);
  if (!value?.trim()) return name === "schema" ? 'Enter a JSON schema, such as {"type": "object"}' : "";
  if (name === "schema") return jsonFault(value, (v) => isRecord(v), "The schema must be a JSON object");
  if (name === "tools") {
    return jsonFault(
      value,
      (v) => Array.isArray(v) && v.every((tool) => typeof functionOf(tool)?.name === "string"),
      "Enter a list of functions, each with a name",
    );
  }
  return "";
}

/** @param {NumberField} field @param {string} value */
function numberFault(field, value) {
  if (!value?.trim()) return "";
  const number = Number(value);
  if (!Number.isFinite(number) || (field.step === 1 && !Number.isInteger(number))) {
    return `${field.label} must be ${field.step === 1 ? "an integer" : "a number"}`;
  }
  if (field.min !== undefined && number < field.min) return `${field.label} must be at least ${field.min}`;
  if (field.max !== undefined && number > field.max) return `${field.label} must be at most ${field.max}`;
  return "";
}

/** @param {string} text @param {(value: any) => boolean} fits @param {string} wanted */
function jsonFault(text, fits, wanted) {
  try {
    return fits(JSON.parse(text)) ? "" : wanted;
  } catch (error) {
    return `Invalid JSON: ${/** @type {Error} */ (error).message}`;
  }
}

/** @param {any} value */
function isRecord(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

/** The function of a tool, which may be given in the API's format or as the function alone.
 * @param {any} tool */
function functionOf(tool) {
  return tool?.function ?? tool;
}

/** The error messages of all settings in use.
 * @param {Settings} settings
 * @returns {string[]} */
export function faults(settings) {
  const names = [...NUMBERS.map((f) => f.name), "tools", ...(settings.format === "schema" ? ["schema"] : [])];
  return names.map((name) => fault(name, settings[name] ?? "")).filter(Boolean);
}

/** The tools of a request; undefined if there are none.
 * @param {Settings} settings @returns {Record<string, any>[] | undefined} */
export function toolsOf(settings) {
  if (!settings.tools?.trim()) return undefined;
  return JSON.parse(settings.tools).map((/** @type {any} */ t) => ({ type: "function", function: functionOf(t) }));
}

/** The request body that answers the last message of a path, or continues it if it is the assistant's. For a model
 * without a chat template, it completes the text of the path: `prompt` in place of `messages`.
 * @param {Message[]} path @param {Settings} settings @param {string} model @param {boolean} plain
 * @returns {Record<string, any>} */
export function requestOf(path, settings, model, plain) {
  const messages = messagesOf(path, settings);
  const begun = path.at(-1);
  if (begun?.role === "assistant" && begun.content && !begun.calls?.length)
    Object.assign(messages.at(-1) ?? {}, { prefix: true });
  /** @type {Record<string, any>} */
  const body = {
    model,
    ...(plain
      ? { prompt: (settings.system ?? "") + path.map((message) => message.content).join("") }
      : { messages, logprobs: true, top_logprobs: 5 }),
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: TOKEN_LIMIT,
  };
  for (const { name } of NUMBERS) {
    if (settings[name]?.trim()) body[name] = Number(settings[name]);
  }
  const stops = (settings.stop ?? "").split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (settings.format === "json") body.response_format = { type: "json_object" };
  if (settings.format === "schema") {
    body.response_format = {
      type: "json_schema",
      json_schema: { name: "answer", schema: JSON.parse(settings.schema) },
    };
  }
  const tools = plain ? undefined : toolsOf(settings);
  if (tools) {
    body.tools = tools;
    if (settings.tool_choice) body.tool_choice = settings.tool_choice;
  }
  return body;
}

/** A path in the format of the API, after the system prompt.
 * @param {Message[]} path @param {Settings} settings @returns {Record<string, any>[]} */
export function messagesOf(path, settings) {
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  return [...system, ...path.flatMap(sent)];
}

/** A message in the format of the API: one for each result of a tool call, none for an empty answer.
 * @param {Message} message @returns {Record<string, any>[]} */
export function sent({ role, content, calls, results }) {
  if (role === "tool") return (results ?? []).map((r) => ({ role, tool_call_id: r.id, content: r.content }));
  if (role === "user") return [{ role, content }];
  if (!calls?.length) return content ? [{ role, content }] : [];
  const made = calls.map(({ id, ...call }) => ({ id, type: "function", function: call }));
  return [{ role, content: content || null, tool_calls: made }];
}
