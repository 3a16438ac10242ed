// The conversation: what was asked and replied, kept by the tab over a reload. It is sent as a whole
// with each question, so that what is on the page is what the model knows.

import { readReply } from "./reply.js";

const STORED = "conversation";
/** What is sent: as many exchanges as the service remembers, and less than the 256 KiB that it takes;
 * both as it comes. Older ones stay here. */
const EXCHANGES = 20;
const ROOM = 240_000;

export class Conversation {
  /** Oldest first; their state is waiting, streaming, done, stopped or failed. */
  exchanges = [];
  id = null;

  constructor() {
    Object.assign(this, ifPossible(() => JSON.parse(sessionStorage.getItem(STORED))));
  }

  /** Forget everything; the next question begins a new conversation. */
  clear() {
    Object.assign(this, { exchanges: [], id: null });
    this.save();
  }

  /** Put a question at the end, in place of one before that is asked again, or otherwise; return
   * its exchange. */
  add(question, before) {
    const exchange = { id: randomId(), question, reply: "", position: "", state: "waiting" };
    this.exchanges = [...this.exchanges.filter((each) => each !== before), exchange];
    return exchange;
  }

  /** Ask for the reply to an exchange, or read on where a reload has cut it off, and tell whenever it
   * has changed. The signal stops the reply. */
  async read(exchange, isNew, signal, onChange) {
    const headers = { "Content-Type": "application/json" };
    const asked = isNew && ["chat", { method: "POST", headers, body: this.#bodyFor(exchange) }];
    this.save();
    try {
      await readReply(exchange, asked, signal, onChange);
      exchange.state = "done";
    } catch (error) {
      exchange.state = error.name === "AbortError" ? "stopped" : "failed";
      exchange.error = error.message;
    }
    this.save();
    onChange();
  }

  /** A transcript with a reply in it takes the place of what the service has stored; one without
   * would be added to what an attempt before may have left there, unless it has an id of its own. */
  #bodyFor({ id, question }) {
    const messages = withinRoom([...this.#transcript(), { role: "user", content: question }]);
    if (messages.every(({ role }) => role === "user")) this.id = randomId();
    return JSON.stringify({ messages, conversation: this.id, reply: id, stream: true });
  }

  /** What the user has seen; a question that failed at once may be one that no model takes. */
  #transcript() {
    return this.exchanges
      .filter(({ reply, state }) => reply.trim() || state === "stopped")
      .slice(-EXCHANGES)
      .flatMap(({ question, reply }) => [
        { role: "user", content: question },
        ...(reply.trim() ? [{ role: "assistant", content: reply }] : []),
      ]);
  }

  /** Keep everything for a reload, with the position in a reply that is running. */
  save() {
    ifPossible(() => sessionStorage.removeItem(STORED)); // what is there may be all that has room
    ifPossible(() => sessionStorage.setItem(STORED, JSON.stringify(this)));
  }
}

/** Return the newest messages that a request may hold, from a question on. */
function withinRoom(messages) {
  const encoder = new TextEncoder();
  let room = ROOM;
  const fits = (message) => (room -= encoder.encode(JSON.stringify(message)).length) >= 0;
  const begin = messages.findLastIndex((message) => !fits(message)) + 1;
  const fitting = messages.slice(Math.min(begin, messages.length - 1));
  return fitting.slice(fitting.findIndex(({ role }) => role === "user"));
}

/** crypto.randomUUID needs https, which a service on a private network may not have. */
const randomId = () => crypto.getRandomValues(new Uint8Array(32)).map((byte) => byte % 10).join("");

/** The browser may deny it, or it may be full: then the conversation lasts until a reload. */
function ifPossible(action) {
  try {
    return action();
  } catch {
    return null;
  }
}
