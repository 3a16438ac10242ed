// A reply, read into its exchange over as many connections as it takes.

import { eventsOf, LOST } from "./events.js";

/** Milliseconds to try in once a connection has broken, before the first token and later. */
const [PATIENCE_AT_FIRST, PATIENCE] = [10_000, 120_000];
const [FIRST_PAUSE, LONGEST_PAUSE, QUIET] = [500, 5_000, 1_000];

/** What to do when the network or the reader is back: a connection that is quiet may be dead. */
let wake = () => {};
window.addEventListener("online", () => wake());
document.addEventListener("visibilitychange", () => document.hidden || wake());

/** Read the reply to its end, and report all that comes. What is `asked` for it is an address and a
 * request, or nothing after a reload. The signal cancels it. Throws as `eventsOf` does. */
export async function readReply(exchange, asked, signal, onChange) {
  const address = `replies/${exchange.id}`;
  const cancel = () => fetch(address, { method: "DELETE", keepalive: true }).catch(() => {});
  signal.addEventListener("abort", cancel);
  let failure = asked ? null : failureOf(exchange, new Error(LOST));
  for (let first = asked; ; first = null) {
    const [where, request] = first || [`${address}?after=${exchange.position}`];
    const cut = new AbortController();
    const either = AbortSignal.any([signal, cut.signal]);
    try {
      return await read(eventsOf(where, { ...request, signal: either }), exchange, cut, onChange);
    } catch (error) {
      if (failure?.position !== exchange.position) failure = failureOf(exchange, error);
      if (error.cause === undefined) throw error;
      const isFinal = error.cause > 0 && (first || error.cause < 500);
      if (isFinal || Date.now() > failure.until) throw failure.error;
    }
    wake = () => cut.abort();
    if (!either.aborted) await rest(failure.pause, either);
    failure.pause = Math.min(2 * failure.pause, LONGEST_PAUSE);
  }
}

async function read(events, exchange, cut, onChange) {
  let heardAt = Date.now();
  const lost = new Error(LOST, { cause: 0 });
  wake = () => exchange.position && Date.now() - heardAt > QUIET && cut.abort(lost);
  for await (const event of events) {
    if (event.data === "[DONE]") return;
    add(event, exchange);
    heardAt = Date.now();
    onChange();
  }
  throw lost;
}

/** An error with a position ends the reply; one without is about this connection. */
function add({ event, data, id }, exchange) {
  const isOver = !exchange.position || ![exchange.position, ""].includes(id);
  const again = !isOver && data.includes("try again") ? { cause: 0 } : {};
  if (event === "error") throw new Error(isOver ? JSON.parse(data).error : LOST, again);
  if (event === "truncated") exchange.truncated = JSON.parse(data).reason;
  else exchange.reply += data;
  Object.assign(exchange, { position: id || exchange.position, state: "streaming" });
}

function failureOf({ position }, error) {
  const patience = position ? PATIENCE : PATIENCE_AT_FIRST;
  return { position, error, until: Date.now() + patience, pause: FIRST_PAUSE };
}

const rest = (milliseconds, signal) =>
  new Promise((resolve) => {
    signal.addEventListener("abort", resolve);
    setTimeout(resolve, milliseconds);
  });
