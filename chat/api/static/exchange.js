// One exchange on the page: what was asked, and the reply as it grows, ends or fails.

import { MarkdownView } from "./render.js";

/** How many times what the last look at a growing reply took passes before the next: one that is
 * very long must leave the page room to breathe. */
const REST = 4;

export class ExchangeView {
  #markdown;
  #frame = null;
  #cost = 0;
  #renderedAt = 0;

  constructor(exchange) {
    this.exchange = exchange;
    this.question = copyOf("question");
    this.reply = copyOf("reply");
    this.elements = [this.question, this.reply];
    this.question.querySelector(".bubble").textContent = exchange.question;
    this.#markdown = new MarkdownView(this.#part(".text"));
    this.update();
  }

  get isRunning() {
    return ["waiting", "streaming"].includes(this.exchange.state);
  }

  /** Show what has changed: the end at once, and more text when the screen is ready for it. */
  update() {
    if (this.reply.dataset.state !== this.exchange.state) this.#showState();
    if (!this.isRunning) this.#render();
    else
      this.#frame ??= requestAnimationFrame((now) => {
        this.#frame = null;
        if (now - this.#renderedAt < REST * this.#cost) this.update();
        else this.#render();
      });
  }

  #showState() {
    const { state, reply, truncated } = this.exchange;
    this.reply.dataset.state = state;
    this.#part(".waiting").hidden = state !== "waiting";
    this.#part(".actions").hidden = this.isRunning || !reply;
    const note = noteOn(this.exchange);
    this.#part(".note").hidden = note === null;
    this.#part(".note-text").textContent = note;
    this.#part(".go-on").hidden = !reply || truncated === "content_filter";
    this.#part(".retry").hidden = state === "done" || (state === "stopped" && reply !== "");
  }

  #render() {
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
    const startedAt = performance.now();
    const { state, reply, truncated } = this.exchange;
    try {
      this.#markdown.show(reply, state !== "done" || Boolean(truncated));
    } catch (error) {
      console.error(error); // a text that cannot be shown well must not stop the conversation
      this.#part(".text").textContent = reply;
    }
    this.#renderedAt = performance.now();
    this.#cost = this.#renderedAt - startedAt;
  }

  #part(selector) {
    return this.reply.querySelector(selector);
  }
}

const copyOf = (templateId) =>
  document.getElementById(templateId).content.firstElementChild.cloneNode(true);

/** Return what is to be said under the reply, if anything. */
function noteOn({ state, reply, error, truncated }) {
  if (state === "failed") return sentence(error);
  if (state === "stopped" && !reply) return "You stopped this before the reply began.";
  if (state === "stopped") return "You stopped this reply.";
  if (truncated === "content_filter") return "A content filter cut this reply off.";
  return truncated ? "This reply reached its length limit." : null;
}

/** Errors come as clauses: "the language model service cannot be reached". */
function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}
