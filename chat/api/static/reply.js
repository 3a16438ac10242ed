// A reply, read into its exchange over as many connections as it takes.

import { eventsOf, LOST } from "./events.js";

/** Milliseconds for which a reply in this state is looked for once its connection has broken. */
const PATIENCE = { waiting: 10_000, streaming: 120_000 };
const [FIRST_PAUSE, LONGEST_PAUSE] = [500, 5_000];
/** Milliseconds without an event after which a connection is not trusted that was out of sight. */
const QUIET = 1_000;

/** What to do at once when the network or the reader is back. */
let wake = () => {};
window.addEventListener("online", () => wake());
document.addEventListener("visibilitychange", () => document.hidden || wake());

/** Read the reply to its end, and tell of all that comes. What is `asked` for it is an address and a
 * request, or nothing after a reload. The signal cancels it. Throws as `eventsOf` does. */
export async function readReply(exchange, asked, signal, onChange) {
  const address = `replies/${exchange.id}`;
  const cancel = () => fetch(address, { method: "DELETE", keepalive: true }).catch(() => {});
  signal.addEventListener("abort", cancel);
  let [heardAt, failure] = [Date.now(), asked ? null : failureOf(exchange, new Error(LOST))];
  const hear = () => {
    [heardAt, failure] = [Date.now(), null];
    onChange();
  };
  for (let first = asked; ; first = null) {
    const cut = new AbortController();
    const isQuiet = () => exchange.position && Date.now() - heardAt > QUIET;
    wake = () => isQuiet() && cut.abort(new Error(LOST, { cause: 0 }));
    const [where, request] = first ?? [`${address}?after=${exchange.position}`];
    const events = eventsOf(where, { ...request, signal: AbortSignal.any([signal, cut.signal]) });
    const error = await take(events, exchange, hear).catch((error) => error);
    if (!error) return;
    failure ??= failureOf(exchange, error);
    if (error.cause === undefined) throw error;
    const isLost = error.cause > 0 && (first || error.cause < 500);
    if (isLost || Date.now() > failure.until) throw failure.error;
    if (!cut.signal.aborted) await rest(failure, signal);
  }
}

/** What broke the connection, or kept it from coming about, and how long that may last. */
function failureOf({ state, reply, position }, error) {
  const isKept = position || !reply; // unless the service gives no positions
  return { error, until: isKept ? Date.now() + PATIENCE[state] : 0, pause: FIRST_PAUSE };
}

async function rest(failure, signal) {
  await new Promise((resolve) => {
    wake = resolve;
    signal.addEventListener("abort", resolve);
    setTimeout(resolve, failure.pause);
  });
  failure.pause = Math.min(2 * failure.pause, LONGEST_PAUSE);
}

/** Add what comes to the exchange. An error that ends the reply has a position as any other event;
 * one that has none is about this connection: its reply is gone, or another reads it. */
async function take(events, exchange, hear) {
  for await (const { event, data, id } of events) {
    const position = id || exchange.position;
    if (event === "error") {
      const isOver = !position || position !== exchange.position;
      throw new Error(isOver ? JSON.parse(data).error : LOST);
    }
    if (data === "[DONE]") return;
    if (event === "truncated") exchange.truncated = JSON.parse(data).reason;
    else exchange.reply += data;
    Object.assign(exchange, { position, state: "streaming" });
    hear();
  }
  throw new Error(LOST, { cause: 0 });
}
