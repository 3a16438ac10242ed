// What a tab remembers over a reload: its conversation's id, and the message that has no reply yet.

const ID = "conversation";
const UNANSWERED = "unanswered";
const ID_BYTES = 24;

export class Session {
  /** What the tab's storage has, or would have if it took it. */
  #values = new Map();

  constructor() {
    for (const name of [ID, UNANSWERED]) this.#values.set(name, fromStore(name));
  }

  /** Whether the conversation may have messages already. */
  get isResumed() {
    return this.#values.get(ID) !== null;
  }

  /** The id, which nobody else can guess: whoever knows it may read the conversation. */
  get conversation() {
    if (!this.isResumed) this.#set(ID, randomId());
    return this.#values.get(ID);
  }

  get unanswered() {
    return this.#values.get(UNANSWERED);
  }

  set unanswered(text) {
    this.#set(UNANSWERED, text);
  }

  /** Begin a new conversation. */
  clear() {
    this.#set(ID, null);
    this.#set(UNANSWERED, null);
  }

  #set(name, value) {
    this.#values.set(name, value);
    try {
      sessionStorage.removeItem(name);
      if (value !== null) sessionStorage.setItem(name, value);
    } catch {
      // The browser denies it, or it is full: then this lasts until a reload.
    }
  }
}

function fromStore(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

/** crypto.randomUUID needs https, which a service on a private network may not have. */
function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(ID_BYTES));
  return btoa(String.fromCharCode(...bytes))
    .replaceAll("+", "-")
    .replaceAll("/", "_");
}
