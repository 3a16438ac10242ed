// What a tab remembers over a reload: its conversation's id, and the message that has no reply yet.

const ID = "conversation";
const UNANSWERED = "unanswered";
const ID_BYTES = 24;

export class Session {
  #store = openStore();

  /** Whether the conversation may have messages already. */
  get isResumed() {
    return this.#store.getItem(ID) !== null;
  }

  /** The id, which nobody else can guess: whoever knows it may read the conversation. */
  get conversation() {
    if (!this.isResumed) this.#store.setItem(ID, randomId());
    return this.#store.getItem(ID);
  }

  get unanswered() {
    return this.#store.getItem(UNANSWERED);
  }

  set unanswered(text) {
    this.#store.removeItem(UNANSWERED);
    try {
      if (text !== null) this.#store.setItem(UNANSWERED, text);
    } catch {
      // It is larger than what the browser keeps: a reload will not bring it back.
    }
  }

  /** Begin a new conversation. */
  clear() {
    this.#store.removeItem(ID);
    this.#store.removeItem(UNANSWERED);
  }
}

/** crypto.randomUUID needs https, which a service on a private network may not have. */
function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(ID_BYTES));
  return btoa(String.fromCharCode(...bytes))
    .replaceAll("+", "-")
    .replaceAll("/", "_");
}

/** Return the tab's storage, or one that lasts until a reload where the browser denies it. */
function openStore() {
  try {
    return window.sessionStorage;
  } catch {
    const values = new Map();
    return {
      getItem: (name) => values.get(name) ?? null,
      setItem: (name, value) => values.set(name, value),
      removeItem: (name) => values.delete(name),
    };
  }
}
