/** Requests to the server of this page, and their errors. */

/** @typedef {"key" | "full" | "closing" | "refused" | "failed" | "lost"} Trouble */

/** An error that the user can act on. `wait`: seconds until a retry makes sense. */
export class Problem extends Error {
  /** @param {Trouble} kind @param {string} message @param {number} [wait] */
  constructor(kind, message, wait = 0) {
    super(message);
    this.kind = kind;
    this.wait = wait;
  }
}

const LOST = "The connection to the server was lost.";
let key = read();

function read() {
  try {
    return sessionStorage.getItem("key") ?? "";
  } catch {
    return "";
  }
}

/** Use this key from now on, until the tab is closed.
 * @param {string} value */
export function useKey(value) {
  key = value.trim();
  try {
    sessionStorage.setItem("key", key);
  } catch {
    /* no storage: the key lasts until the page is reloaded */
  }
}

/** Whether a key is set. */
export function hasKey() {
  return key !== "";
}

/** Send a request and return a successful response. Throws a Problem, or an AbortError.
 * @param {string} path
 * @param {{body?: object, signal?: AbortSignal}} [how]
 * @returns {Promise<Response>} */
export async function call(path, { body, signal } = {}) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    throw lostUnlessAborted(error);
  }
  if (response.ok) return response;
  throw await problemOf(response);
}

/** Convert an error of fetch or its stream to a Problem; an AbortError stays as it is.
 * @param {any} error */
export function lostUnlessAborted(error) {
  return error instanceof Problem || error?.name === "AbortError" ? error : new Problem("lost", LOST);
}

/** @param {Response} response @returns {Promise<Problem>} */
async function problemOf(response) {
  let said = `The server answered ${response.status}.`;
  try {
    said = (await response.json()).error.message;
  } catch {
    /* not the server's JSON, as from a proxy */
  }
  const wait = secondsOf(response.headers.get("retry-after"));
  if (response.status === 401 || response.status === 403) return new Problem("key", said);
  if (response.status === 429) return new Problem("full", said, wait || 1);
  if (response.status === 503) return new Problem("closing", said, wait || 2);
  return new Problem(response.status < 500 ? "refused" : "failed", said);
}

/** The seconds of a Retry-After header, which holds a number or a date.
 * @param {string | null} value */
function secondsOf(value) {
  if (!value) return 0;
  const seconds = /^\d+$/.test(value) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : 0;
}

/** Whether the server responds; needs no key.
 * @returns {Promise<boolean>} */
export async function alive() {
  try {
    return (await fetch("/health/live", { cache: "no-store", signal: AbortSignal.timeout(3000) })).ok;
  } catch {
    return false;
  }
}

/** The number of tokens of a conversation.
 * @param {object} body @returns {Promise<number>} */
export async function count(body) {
  return (await (await call("/tokenize", { body, signal: AbortSignal.timeout(3000) })).json()).count;
}

/** @typedef {{id: string, parent?: string | null, max_model_len?: number, precision?: string,
 *   chat_template?: boolean | null, tokenizer?: Tokenizer | null, sampling_defaults?: Record<string, number>}} Model
 * @typedef {{kind: string, file: string, vocab_size: number, added_tokens: number,
 *   ends: {id: number, token: string}[], chat: {name: string, tools: boolean, system: boolean} | null}} Tokenizer */

/** The model and its adapters.
 * @returns {Promise<Model[]>} */
export async function models() {
  return (await (await call("/v1/models")).json()).data;
}
