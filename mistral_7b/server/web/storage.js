/** Storage in the browser: preferences in localStorage, conversations in IndexedDB. Nothing is sent anywhere. */

import { Seeker } from "./search.js";

/** @typedef {import("./search.js").Find} Find */
/** @typedef {import("./tree.js").Conversation} Conversation @typedef {import("./tree.js").Message} Message */

/** @param {string} name @returns {string | null} */
export function kept(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** Called after each attempt to store a preference. @type {(full: boolean) => void} */
let report = () => {};

/** @param {typeof report} action called with whether the storage for preferences is full */
export function onKeep(action) {
  report = action;
}

/** Store a preference; null deletes it.
 * @param {string} name @param {string | null} value */
export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
    report(false);
  } catch (error) {
    if (isFull(error)) report(true);
    // else no storage, as in private windows of some browsers: the preference lasts until the page is closed
  }
}

/** Whether an error means that the browser's storage for this page is full. @param {any} error */
export function isFull(error) {
  return error?.name === "QuotaExceededError";
}

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** @param {IDBTransaction} transaction @returns {Promise<void>} */
function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

/** Stores conversations and messages. Each message is a separate record, so that streaming saves only that one. */
export class Store {
  /** @param {IDBDatabase} database */
  constructor(database) {
    this.database = database;
    /** Ids of conversations deleted here or in another tab, which are no longer saved. @type {Set<string>} */
    this.gone = new Set();
  }

  /** Called after a change, to notify other tabs. @type {import("./tabs.js").Tabs["tell"]} */
  tell = () => {};

  /** Open the database, or a store in memory if the browser allows no storage.
   * @returns {Promise<Store | MemoryStore>} */
  static async open() {
    try {
      return await Store.#open();
    } catch {
      return new MemoryStore();
    }
  }

  static async #open() {
    const request = indexedDB.open("mistral-7b", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    const database = await done(request);
    database.onversionchange = () => database.close(); // lets a newer page in another tab upgrade the schema
    return new Store(database);
  }

  /** @returns {Promise<Conversation[]>} most recently changed first */
  async conversations() {
    const all = await done(this.database.transaction("conversations").objectStore("conversations").getAll());
    return all.sort((a, b) => b.updated - a.updated);
  }

  /** @param {string} id @returns {Promise<Conversation | undefined>} */
  conversation(id) {
    return done(this.database.transaction("conversations").objectStore("conversations").get(id));
  }

  /** @param {string} id @returns {Promise<Message[]>} */
  messages(id) {
    return done(this.database.transaction("messages").objectStore("messages").index("conversation").getAll(id));
  }

  /** @param {Conversation | null} conversation @param {Message[]} [messages] */
  async save(conversation, messages = []) {
    const id = conversation?.id ?? messages[0]?.conversation;
    if (id === undefined || this.gone.has(id)) return;
    const transaction = this.database.transaction(["conversations", "messages"], "readwrite");
    if (conversation) transaction.objectStore("conversations").put(conversation);
    for (const message of messages) transaction.objectStore("messages").put(message);
    await finished(transaction);
    this.tell("changed", id, conversation !== null);
  }

  /** Delete a conversation and its messages. @param {string} id */
  async remove(id) {
    this.gone.add(id);
    const transaction = this.database.transaction(["conversations", "messages"], "readwrite");
    transaction.objectStore("conversations").delete(id);
    const messages = transaction.objectStore("messages");
    const request = messages.index("conversation").openKeyCursor(id);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor) return;
      messages.delete(cursor.primaryKey);
      cursor.continue();
    };
    await finished(transaction);
    this.tell("removed", id);
  }

  /** Find conversations with all words of the query in one message or in the title.
   * @param {string} query @param {Conversation[]} conversations
   * @returns {Promise<Map<string, Find>>} */
  async search(query, conversations) {
    const seeker = new Seeker(query, conversations);
    const request = this.database.transaction("messages").objectStore("messages").openCursor();
    await new Promise((resolve, reject) => {
      request.onerror = () => reject(request.error);
      request.onsuccess = () => {
        const cursor = request.result;
        if (!cursor) return resolve(undefined);
        seeker.look(cursor.value);
        cursor.continue();
      };
    });
    return seeker.found;
  }
}

/** A Store in memory, which lasts until the page is closed. */
export class MemoryStore {
  /** @type {Map<string, Conversation>} */
  #conversations = new Map();
  /** @type {Map<string, Message>} */
  #messages = new Map();
  /** @type {Set<string>} */
  gone = new Set();

  /** Does nothing: other tabs cannot see this store. */
  tell() {}

  /** @param {string} id */
  async conversation(id) {
    return this.#conversations.get(id);
  }

  async conversations() {
    return [...this.#conversations.values()];
  }

  /** @param {string} id */
  async messages(id) {
    return [...this.#messages.values()].filter((m) => m.conversation === id);
  }

  /** @param {Conversation | null} conversation @param {Message[]} [messages] */
  async save(conversation, messages = []) {
    if (conversation) this.#conversations.set(conversation.id, conversation);
    for (const message of messages) this.#messages.set(message.id, message);
  }

  /** @param {string} id */
  async remove(id) {
    this.#conversations.delete(id);
    for (const message of await this.messages(id)) this.#messages.delete(message.id);
  }

  /** @param {string} query @param {Conversation[]} conversations */
  async search(query, conversations) {
    const seeker = new Seeker(query, conversations);
    for (const message of this.#messages.values()) seeker.look(message);
    return seeker.found;
  }
}
