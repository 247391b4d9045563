/** Parses server-sent events, and builds an answer from them. */

import { Problem, call, lostUnlessAborted } from "./api.js";

/** @typedef {import("./tree.js").Message} Message @typedef {import("./tree.js").Token} Token */

/** Yield the data of each event. Lines end in \n or \r\n; chunks may be split anywhere.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>} */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const whole = rest.split(/\r?\n\r?\n/);
      rest = whole.pop() ?? "";
      for (const event of whole) {
        const data = event
          .split(/\r?\n/)
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, ""));
        if (data.length) yield data.join("\n"); // events without data are keep-alive comments
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the stream may have failed before
  }
}

/** Send a request, for a chat or a completion, and stream the answer into the message, whose state tells how it ended. `changed` is called after
 * each event. Throws a Problem or an AbortError; the message keeps what was received.
 * @param {Message} message @param {Record<string, any>} body
 * @param {{signal: AbortSignal, changed: () => void}} how */
export async function answer(message, body, { signal, changed }) {
  const began = performance.now();
  const clock = { began, first: 0, last: 0, tokens: 0 };
  let ended = false;
  const response = await call("prompt" in body ? "/v1/completions" : "/v1/chat/completions", { body, signal });
  try {
    for await (const data of events(/** @type {ReadableStream<Uint8Array>} */ (response.body))) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem("failed", chunk.error.message);
      take(message, chunk, clock);
      changed();
    }
  } catch (error) {
    throw error instanceof SyntaxError
      ? new Problem("failed", "The server sent invalid JSON.")
      : lostUnlessAborted(error);
  }
  if (!ended) throw new Problem("lost", "The connection to the server was lost.");
  if (message.state === "streaming") message.state = "done";
}

/** Times in milliseconds; `tokens` counts those after the first event.
 * @typedef {{began: number, first: number, last: number, tokens: number}} Clock */

/** @param {Message} message @param {any} chunk @param {Clock} clock */
function take(message, chunk, clock) {
  message.model = chunk.model ?? message.model;
  if (chunk.usage) message.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, tool_calls: calls } = choice.delta ?? { content: choice.text };
  const tokens = choice.logprobs?.content ?? [];
  if (content) message.content += content;
  if (content && !tokens.length && !message.tokens?.length) {
    message.given = message.content.length; // the server sends no log-probabilities
  }
  (message.tokens ??= []).push(...tokens.map(token));
  for (const call of calls ?? []) takeCall(message, call);
  if (content || calls?.length || tokens.length) time(message, clock, tokens.length || 1);
  if (choice.finish_reason) message.state = choice.finish_reason === "length" ? "length" : "done";
}

/** @param {Message} message @param {Clock} clock @param {number} count */
function time(message, clock, count) {
  clock.last = performance.now();
  if (!clock.first) {
    clock.first = clock.last;
    message.first = clock.first - clock.began;
    return; // the rate covers later tokens only
  }
  clock.tokens += count;
  if (clock.last > clock.first + 100) message.rate = (1000 * clock.tokens) / (clock.last - clock.first);
}

/** @param {Message} message @param {any} delta */
function takeCall(message, delta) {
  const calls = (message.calls ??= []);
  const call = (calls[delta.index] ??= { id: "", name: "", arguments: "" });
  call.id = delta.id ?? call.id;
  call.name += delta.function?.name ?? "";
  call.arguments += delta.function?.arguments ?? "";
}

/** Convert a log-probability entry. Bytes are stored only if the text differs, as for a part of a character.
 * @param {any} entry @returns {Token} */
function token(entry) {
  const one = (/** @type {any} */ e) => ({
    t: e.token,
    p: e.logprob,
    ...(e.bytes && !whole(e) ? { b: e.bytes } : {}),
  });
  return { ...one(entry), a: (entry.top_logprobs ?? []).map(one) };
}

const encoder = new TextEncoder();

/** @param {{token: string, bytes: number[]}} entry */
function whole(entry) {
  const bytes = encoder.encode(entry.token);
  return bytes.length === entry.bytes.length && bytes.every((byte, i) => byte === entry.bytes[i]);
}
