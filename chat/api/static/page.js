// The chat page: what happens on it, and what it asks of the service.

import { copyFor } from "./clipboard.js";
import { Connection } from "./connection.js";
import { Exchange } from "./exchange.js";
import { EndFollower } from "./scroll.js";
import { Session } from "./session.js";

/** How much is told again to a service that has forgotten the conversation. */
const RETOLD_EXCHANGES = 20;
const RETOLD_CHARACTERS = 50_000;
/** A screen reader is read a reply up to here, and told of the rest. */
const SPOKEN_CHARACTERS = 1000;
/** Milliseconds that words for a screen reader stay: whoever reads on would meet them again. */
const ANNOUNCED = 10_000;
/** Milliseconds that the service has to give the conversation. */
const LOADING = 10_000;

const byId = (id) => document.getElementById(id);
const [log, form, field, notice, status] = ["log", "composer", "message", "notice", "status"].map(
  byId,
);

const session = new Session();
const connection = new Connection(address("chat", "ws"), showConnection);
const end = new EndFollower(byId("scroller"), log, byId("jump"));

/** The exchanges on the page, oldest first; the one that runs; what the connection has been. */
let exchanges = [];
let running = null;
let knownLosses = 0;
let silencing = null;
let loading = load();

/** Return the address of a path of the service, which may stand below another site's path. */
function address(path, protocol = "http") {
  const url = new URL(path, document.baseURI);
  url.protocol = url.protocol.replace("http", protocol);
  return url.href;
}

function conversationAddress() {
  return address(`conversations/${session.conversation}`);
}

/** Show what the service remembers of the conversation. */
async function load() {
  connection.wake();
  if (!session.isResumed) return show([]);
  byId("unloaded").hidden = true;
  document.body.dataset.state = "loading";
  const { conversation } = session;
  const messages = await storedMessages().catch(() => null);
  if (!session.isResumed || session.conversation !== conversation) return; // it is another's turn
  byId("unloaded").hidden = messages !== null;
  byId("forgotten").hidden = messages?.length !== 0 || session.unanswered !== null;
  show(messages ?? []);
  restoreUnanswered();
}

async function storedMessages() {
  const answer = await fetch(conversationAddress(), { signal: AbortSignal.timeout(LOADING) });
  if (answer.status === 404) return [];
  if (!answer.ok) throw new Error(`the messages were answered with ${answer.status}`);
  return (await answer.json()).messages;
}

function show(messages) {
  log.replaceChildren();
  exchanges = [];
  for (const { role, content } of messages) {
    if (role === "user") add(new Exchange(content));
    else exchanges.at(-1)?.append(content);
  }
  for (const exchange of exchanges) exchange.end();
  document.body.dataset.state = "idle";
  showEmptiness();
  if (exchanges.length > 0) end.goToEnd();
}

/** A message whose reply failed or was cut off is not stored; it is not to be typed once more. */
function restoreUnanswered() {
  const text = session.unanswered;
  if (text === null || exchanges.at(-1)?.question === text) return;
  add(new Exchange(text)).fail("This message got no reply");
}

function add(exchange) {
  exchanges = [...exchanges.filter((each) => each !== exchange), exchange];
  log.append(...exchange.elements);
  showEmptiness();
  end.goToEnd();
  return exchange;
}

function showEmptiness() {
  byId("welcome").hidden = exchanges.length > 0 || !byId("unloaded").hidden;
}

/** Ask, or ask again: an attempt that failed is replaced, at the end of the conversation. */
function ask(exchange) {
  if (running) return;
  running = exchange;
  session.unanswered = exchange.question;
  document.body.dataset.state = "running";
  exchange.begin();
  add(exchange);
  announce("Waiting for the reply.");
  connection.ask({
    request: () => requestFor(exchange),
    onToken: (token) => exchange.append(token),
    onDone: (isStopped) => (isStopped ? stopped(exchange) : done(exchange)),
    onError: (message) => failed(exchange, message),
  });
}

async function requestFor({ question }) {
  const { conversation } = session;
  const earlier = (await isForgotten()) ? storedBefore() : [];
  const messages = [...earlier, { role: "user", content: question }];
  return { messages, conversation };
}

/** Tell whether the service has lost the conversation, as it does with its memory at a restart. */
async function isForgotten() {
  const isSameConnection = connection.losses === knownLosses;
  if (isSameConnection || !exchanges.some(({ isStored }) => isStored)) return false;
  const answer = await fetch(conversationAddress()).catch(() => null);
  return answer?.status === 404;
}

/** Return the newest of the messages that were stored, as far as a request may hold them. */
function storedBefore() {
  let room = RETOLD_CHARACTERS;
  const newest = exchanges
    .filter(({ isStored }) => isStored)
    .slice(-RETOLD_EXCHANGES)
    .reverse();
  const taken = newest.filter(
    ({ question, reply }) => (room -= question.length + reply.length) > 0,
  );
  return taken.reverse().flatMap(({ question, reply }) => [
    { role: "user", content: question },
    { role: "assistant", content: reply },
  ]);
}

function done(exchange) {
  exchange.end();
  settle(`Reply: ${spoken(exchange.shownReply)}`);
}

function stopped(exchange) {
  exchange.stop();
  settle("Stopped.");
}

function failed(exchange, message) {
  exchange.fail(message);
  settle(`There was an error: ${message}`);
}

/** Be ready for the next message. */
function settle(words) {
  const { isStored, question } = running;
  if (isStored) knownLosses = connection.losses;
  session.unanswered = isStored ? null : question;
  running = null;
  if (document.activeElement === byId("stop")) field.focus(); // it is about to go
  document.body.dataset.state = "idle";
  announce(words);
  end.update();
}

function spoken(text) {
  if (text.length <= SPOKEN_CHARACTERS) return text;
  return `${text.slice(0, SPOKEN_CHARACTERS)}… The whole reply is on the page.`;
}

/** Have a screen reader say it, when it has finished what it is saying. */
function announce(words) {
  status.textContent = words;
  clearTimeout(silencing);
  silencing = setTimeout(() => (status.textContent = ""), ANNOUNCED);
}

function showConnection(state) {
  notice.textContent = state === "lost" ? "Reconnecting…" : "";
}

async function submit(event) {
  event.preventDefault();
  await loading;
  const text = field.value.trim();
  if (!text || running) return;
  field.value = "";
  fitField();
  ask(new Exchange(text));
  field.focus();
}

function stop() {
  connection.stop();
  field.focus();
}

function startOver() {
  if (running) {
    running = null;
    connection.abandon();
  }
  session.clear();
  loading = null;
  byId("unloaded").hidden = true;
  byId("forgotten").hidden = true;
  show([]);
  announce("This is a new conversation.");
  field.focus();
}

/** Let the field be as high as its text; the style sheet says how high at most. */
function fitField() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

/** On a touch screen Enter begins a new line: there is no Shift to hold, but a button beside it. */
const isTouched = window.matchMedia("(hover: none) and (pointer: coarse)");

/** Some browsers say of the key that ends a composition only that the input method had it. */
const OF_INPUT_METHOD = 229;

function isComposing({ isComposing, keyCode }) {
  return isComposing || keyCode === OF_INPUT_METHOD;
}

function pressed(event) {
  const isSend = event.key === "Enter" && !event.shiftKey && !isTouched.matches;
  if (!isSend || isComposing(event)) return;
  event.preventDefault();
  form.requestSubmit();
}

function clickedInLog({ target }) {
  const button = target.closest("button");
  const exchange = exchanges.find(({ replyElement }) => replyElement.contains(button));
  if (!button || !exchange) return;
  if (button.matches(".copy-code")) {
    copyFor(button, button.closest(".code").querySelector("pre").textContent, announce);
  } else if (button.matches(".copy-reply")) {
    copyFor(button, exchange.reply, announce);
  } else if (button.matches(".retry")) {
    ask(exchange);
    field.focus();
  }
}

form.addEventListener("submit", submit);
field.addEventListener("keydown", pressed);
field.addEventListener("input", () => {
  connection.wake();
  fitField();
});
log.addEventListener("click", clickedInLog);
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", startOver);
byId("jump").addEventListener("click", () => byId("scroller").focus({ preventScroll: true }));
byId("reload").addEventListener("click", () => {
  if (!running) loading = load();
  field.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !isComposing(event)) stop();
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    ask(new Exchange(example.textContent.trim()));
    field.focus();
  });
}
fitField();
