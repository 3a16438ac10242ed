// A reply, read into its exchange over as many connections as it takes.

import { eventsOf, LOST } from "./events.js";

/** Milliseconds for which a reply in this state is looked for after its connection has broken. */
const PATIENCE = { waiting: 10_000, streaming: 120_000 };
const [FIRST_PAUSE, LONGEST_PAUSE] = [500, 5_000];
/** Milliseconds without an event after which a connection may have died while nobody was there. */
const QUIET = 1_000;

/** What to do at once when the network, or the reader, is back. */
let wake = () => {};
window.addEventListener("online", () => wake());
document.addEventListener("visibilitychange", () => document.hidden || wake());

/** Ask, unless that was done before a reload, and read the reply to its end; tell of all that comes.
 * The signal stops it, here and there. Throws an error with a message for people. */
export async function readReply(exchange, asked, signal, onChange) {
  const address = `replies/${exchange.id}`;
  const cancel = { method: "DELETE", keepalive: true };
  signal.addEventListener("abort", () => fetch(address, cancel).catch(() => {}));
  const broken = (error) => ({ error, until: Date.now() + PATIENCE[exchange.state] });
  let [pause, heardAt] = [FIRST_PAUSE, Date.now()];
  let failure = asked ? null : broken(new Error(LOST));
  const hear = () => {
    [pause, heardAt, failure] = [FIRST_PAUSE, Date.now(), null];
    onChange();
  };
  for (let request = asked; ; request = null) {
    const cut = new AbortController();
    const isQuiet = () => exchange.position && Date.now() - heardAt > QUIET;
    wake = () => isQuiet() && cut.abort(new Error(LOST, { cause: 0 }));
    const either = { signal: AbortSignal.any([signal, cut.signal]) };
    const headers = { "Last-Event-ID": exchange.position || "0" };
    const events = request
      ? eventsOf("chat", { ...request, ...either })
      : eventsOf(address, { headers, ...either });
    const error = await take(events, exchange, hear).catch((error) => error);
    if (!error) return;
    failure ??= broken(error);
    if (error.cause === undefined) throw error;
    const isBroken = error.cause === 0 || (!request && error.cause >= 500);
    const isKept = exchange.position || !exchange.reply;
    if (!isBroken || !isKept || Date.now() > failure.until) throw failure.error;
    if (!cut.signal.aborted) await rest(pause, signal);
    pause = Math.min(2 * pause, LONGEST_PAUSE);
  }
}
