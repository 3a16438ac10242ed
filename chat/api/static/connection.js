// The WebSocket: one question at a time, and a connection that comes back by itself.

/** Close codes, as the service uses them. */
const IDLE = 1001;
const NOT_ALLOWED = 1008;
const RESTARTING = 1012;
const TOO_BUSY = 1013;

const FIRST_WAIT = 500;
const LONGEST_WAIT = 20_000;
/** The same while a question waits. */
const LONGEST_WAIT_ASKED = 2_000;
/** Milliseconds after which a connection that breaks is not counted as one more failed attempt. */
const STABLE = 1_000;
/** Milliseconds that a question waits for a connection. */
const DELIVERY = 10_000;
/** Milliseconds that the service has to end a reply that was stopped. */
const STOPPING = 5_000;
/** Milliseconds in which a close follows the error that announces it. */
const LAST_WORDS = 250;

const UNREACHABLE = "The service cannot be reached.";
const LOST = "The connection was lost.";
const NOT_SENT = "The message could not be sent.";

/**
 * @typedef {object} Question
 * @property {() => Promise<object>} request makes the request, once there is a connection.
 * @property {(token: string) => void} onToken
 * @property {(isStopped: boolean) => void} onDone
 * @property {(message: string) => void} onError
 */

export class Connection {
  #url;
  #onChange;
  #socket = null;
  #openedAt = 0;
  #failures = 0;
  /** The timer of the next attempt; "visible" where that waits until the page is looked at. */
  #retry = null;
  /** Why the service will not have this page at all. */
  #refusal = null;
  #lastWords = UNREACHABLE;
  /** The question that waits for its reply, and how far it has come. */
  #asked = null;

  /** How often it was lost; after each time the service may be another one. */
  losses = 0;

  /**
   * @param {string} url
   * @param {(state: "open" | "resting" | "lost") => void} onChange
   */
  constructor(url, onChange) {
    this.#url = url;
    this.#onChange = onChange;
    document.addEventListener("visibilitychange", () => this.wake());
    window.addEventListener("offline", () => onChange("lost"));
    window.addEventListener("online", () => this.#goOnline());
  }

  /** Connect, unless that is so already or will be soon. */
  wake() {
    const isDue = this.#retry === null || (this.#retry === "visible" && !document.hidden);
    if (isDue) this.#connect();
  }

  /** A connection may have gone with the network without a word: of it, only an answer tells. */
  #goOnline() {
    if (this.#asked?.isSent && !this.#asked.isAnswered) this.#lose(0);
    else if (this.#isOpen) this.#onChange("open");
    else if (this.#retry) this.#connect();
  }

  #connect() {
    if (this.#socket || this.#refusal) return;
    clearTimeout(this.#retry);
    this.#retry = null;
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    this.#openedAt = Date.now();
    socket.addEventListener("open", () => socket === this.#socket && this.#opened());
    socket.addEventListener("message", ({ data }) => socket === this.#socket && this.#hear(data));
    socket.addEventListener("close", ({ code }) => socket === this.#socket && this.#lose(code));
  }

  /** @param {Question} question which waits until there is a connection */
  ask(question) {
    const deadline = setTimeout(() => this.#fail(UNREACHABLE), DELIVERY);
    this.#asked = { ...question, deadline, attempts: 0 };
    if (this.#refusal) return this.#fail(this.#refusal);
    this.#connect();
    if (this.#isOpen) this.#deliver();
  }

  /** Stop the reply; what has come of it is kept. */
  stop() {
    const asked = this.#asked;
    if (!asked || asked.isStopped) return;
    if (!asked.isSent) return this.#end().onDone(true);
    if (asked.error) return this.#fail(asked.error);
    asked.isStopped = true;
    this.#socket.send(JSON.stringify({ cancel: true }));
    this.#awaitStop();
  }

  #awaitStop() {
    clearTimeout(this.#asked.deadline);
    this.#asked.deadline = setTimeout(() => this.#lose(0), STOPPING);
  }

  /** Forget the question, and whatever still comes of its reply. */
  abandon() {
    if (!this.#asked) return;
    const { isSent } = this.#end();
    if (!isSent) return;
    this.#disconnect();
    this.#connect();
  }

  get #isOpen() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  #opened() {
    this.#onChange("open");
    if (this.#asked) this.#deliver();
  }

  async #deliver() {
    const asked = this.#asked;
    const socket = this.#socket;
    const request = await asked.request().then(JSON.stringify, () => null);
    if (asked === this.#asked && request === null) return this.#fail(NOT_SENT);
    if (asked !== this.#asked || asked.isSent || socket !== this.#socket || !this.#isOpen) return;
    clearTimeout(asked.deadline);
    asked.isSent = true;
    asked.attempts += 1;
    socket.send(request);
  }

  #hear(data) {
    const message = JSON.parse(data);
    if ("error" in message) return this.#hearError(message.error);
    if (!this.#asked?.isSent) return;
    this.#asked.isAnswered = true;
    if (this.#asked.isStopped) this.#awaitStop(); // what was on its way still comes
    if ("token" in message) this.#asked.onToken(message.token);
    else this.#end().onDone("cancelled" in message);
  }

  /** It may answer the question, or announce a close that crosses it: what follows will tell. */
  #hearError(message) {
    this.#lastWords = message;
    const asked = this.#asked;
    if (!asked?.isSent) return;
    if (asked.isAnswered) return this.#fail(message);
    asked.error = message;
    clearTimeout(asked.deadline);
    asked.deadline = setTimeout(() => this.#fail(message), LAST_WORDS);
  }

  #lose(code) {
    this.#disconnect();
    this.#failures = Date.now() - this.#openedAt > STABLE ? 0 : this.#failures + 1;
    if (code === TOO_BUSY) this.#failures = Math.max(this.#failures, 4);
    if (code === NOT_ALLOWED) return this.#giveUp();
    this.#takeBack(code);
    if (code === IDLE && !this.#asked) return this.#onChange("resting");
    this.#onChange("lost");
    this.#reconnect();
  }

  #disconnect() {
    const socket = this.#socket;
    this.#socket = null;
    this.losses += 1;
    socket?.close();
  }

  #giveUp() {
    this.#refusal = this.#lastWords;
    this.#onChange("resting");
    if (this.#asked) this.#fail(this.#refusal);
  }

  /** See to the question that a lost connection leaves behind. */
  #takeBack(code) {
    const asked = this.#asked;
    if (!asked?.isSent) return;
    // Nothing was heard of it, so that it is asked once more: a connection may have been dead long
    // before that showed. The service keeps nothing of a question whose caller has gone.
    const { isAnswered, isStopped, attempts, error } = asked;
    const isUnread = !error || code === IDLE || code === RESTARTING;
    if (isAnswered || isStopped || attempts > 1 || !isUnread) return this.#fail(error ?? LOST);
    asked.isSent = false;
    asked.error = null;
    clearTimeout(asked.deadline);
    asked.deadline = setTimeout(() => this.#fail(UNREACHABLE), DELIVERY);
  }

  #reconnect() {
    if (document.hidden && !this.#asked) {
      this.#retry = "visible";
      return;
    }
    const longest = this.#asked ? LONGEST_WAIT_ASKED : LONGEST_WAIT;
    const wait = Math.min(longest, FIRST_WAIT * 2 ** this.#failures);
    this.#retry = setTimeout(() => this.#connect(), wait * (0.5 + Math.random() / 2));
  }

  #end() {
    const asked = this.#asked;
    clearTimeout(asked.deadline);
    this.#asked = null;
    return asked;
  }

  #fail(message) {
    this.#end().onError(message);
  }
}
