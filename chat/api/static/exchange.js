// One exchange on the page: what was asked, and the reply as it grows, ends or fails.

import { showMarkdown } from "./markdown.js";

/** Milliseconds between two looks at a reply that grows, and how many times what the last one took:
 * a very long reply must leave the page room to breathe. */
const FRAME = 16;
const REST = 3;

export class Exchange {
  /** The text of the reply, so far. */
  reply = "";
  /** Whether the service has stored it. */
  isStored = false;
  #rendering = null;
  #cost = 0;

  /** @param {string} question */
  constructor(question) {
    this.question = question;
    this.questionElement = copyOf("question");
    this.replyElement = copyOf("reply");
    this.questionElement.querySelector(".bubble").textContent = question;
  }

  get elements() {
    return [this.questionElement, this.replyElement];
  }

  /** The reply as it is read, without the marks of its Markdown. */
  get shownReply() {
    return this.#part(".text").innerText;
  }

  /** Wait for a reply; whatever an attempt before has left goes. */
  begin() {
    this.reply = "";
    this.#render();
    this.#enter("waiting");
  }

  /** Tokens may come faster than the screen can show them. */
  append(token) {
    this.reply += token;
    const pause = Math.max(FRAME, REST * this.#cost);
    this.#rendering ??= setTimeout(() => this.#render(true), pause);
    if (this.#state === "waiting") this.#enter("streaming");
  }

  end() {
    this.isStored = true;
    this.#render();
    this.#enter("done");
  }

  /** End a reply that was stopped; nothing is stored of one that had not begun. */
  stop() {
    this.isStored = this.reply !== "";
    this.#render();
    this.#enter("stopped");
    this.#part(".stopped-text").textContent = this.isStored
      ? "You stopped this reply."
      : "You stopped this before the reply began.";
    this.#part(".stopped .retry").hidden = this.isStored;
  }

  fail(message) {
    this.#render();
    this.#enter("failed");
    this.#part(".failure-text").textContent = sentence(message);
  }

  get #state() {
    return this.replyElement.dataset.state;
  }

  #enter(state) {
    this.replyElement.dataset.state = state;
    this.#part(".waiting").hidden = state !== "waiting";
    this.#part(".stopped").hidden = state !== "stopped";
    this.#part(".failure").hidden = state !== "failed";
    this.#part(".actions").hidden = !this.reply || ["waiting", "streaming"].includes(state);
  }

  #part(selector) {
    return this.replyElement.querySelector(selector);
  }

  #render(isOpen = false) {
    clearTimeout(this.#rendering);
    this.#rendering = null;
    const startedAt = performance.now();
    const place = this.#part(".text");
    try {
      showMarkdown(place, this.reply, isOpen);
    } catch (error) {
      console.error(error); // a text that cannot be shown well must not stop the conversation
      place.textContent = this.reply;
    }
    this.#cost = performance.now() - startedAt;
  }
}

/** @param {string} template the id of a template in the page */
function copyOf(template) {
  return document.getElementById(template).content.firstElementChild.cloneNode(true);
}

/** Errors come as clauses: "the language model service cannot be reached". */
function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}
