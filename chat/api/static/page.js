// The chat page: what its user does, and what they see and hear of it.

import { copyFor } from "./clipboard.js";
import { Conversation } from "./conversation.js";
import { ExchangeView } from "./exchange.js";
import { EndFollower } from "./scroll.js";

/** A screen reader is read a reply up to here, and told of the rest. */
const SPOKEN_CHARACTERS = 1000;
/** Milliseconds that words for a screen reader stay: further reading would meet them again. */
const ANNOUNCED = 10_000;

const byId = (id) => document.getElementById(id);
const [log, form, field, status] = ["log", "composer", "message", "status"].map(byId);

const conversation = new Conversation();
const end = new EndFollower(byId("scroller"), log, byId("jump"));

/** The exchanges as they are shown; how to stop the one that runs; the one that is edited, and what
 * stood in the field before. */
let views = [];
let running = null;
let editing = null;
let draft = "";
let silencing = null;

/** Ask; the view of an attempt before, if there was one, makes way. */
function ask(question, before = null) {
  if (running) return;
  stopEditing();
  if (before) remove(before);
  follow(add(conversation.add(question, before?.exchange)), true);
}

/** Show a reply while it comes. */
async function follow(view, isNew) {
  const stopping = (running = new AbortController());
  document.body.dataset.state = "running";
  announce("Waiting for the reply.");
  await conversation.read(view.exchange, isNew, stopping.signal, () => view.update());
  if (running === stopping) settle(view); // otherwise the conversation is over
}

function add(exchange) {
  const view = new ExchangeView(exchange);
  views.push(view);
  log.append(...view.elements);
  byId("welcome").hidden = true;
  end.goToEnd();
  return view;
}

function remove(view) {
  views = views.filter((each) => each !== view);
  for (const element of view.elements) element.remove();
}

/** Be ready for the next message. */
function settle(view) {
  running = null;
  if (document.activeElement === byId("stop")) field.focus(); // it is about to go
  document.body.dataset.state = "idle";
  announce(spoken(view));
  end.update();
}

function spoken({ exchange, reply }) {
  const note = reply.querySelector(".note:not([hidden]) .note-text")?.textContent;
  if (exchange.state === "stopped") return "Stopped.";
  if (exchange.state === "failed") return `There was an error: ${note}`;
  const shown = reply.querySelector(".text").innerText; // without the marks of its Markdown
  const text = note ? `${shown}\n${note}` : shown;
  if (text.length <= SPOKEN_CHARACTERS) return `Reply: ${text}`;
  return `Reply: ${text.slice(0, SPOKEN_CHARACTERS)}… The whole reply is on the page.`;
}

/** Have a screen reader say it, when it has finished what it is saying. */
function announce(words) {
  status.textContent = words;
  clearTimeout(silencing);
  silencing = setTimeout(() => (status.textContent = ""), ANNOUNCED);
}

function submit(event) {
  event.preventDefault();
  const text = field.value.trim();
  if (!text || running) return;
  if (!editing) fill("");
  ask(text, editing);
}

function stop() {
  running?.abort();
  field.focus();
}

function startOver() {
  running?.abort();
  running = null;
  stopEditing();
  conversation.clear();
  log.replaceChildren();
  views = [];
  document.body.dataset.state = "idle";
  byId("welcome").hidden = false;
  announce("This is a new conversation.");
  field.focus();
}

/** Take the question into the field; the exchange stays until the question is asked again. */
function edit(view) {
  if (!editing) draft = field.value;
  editing = view;
  byId("editing").hidden = false;
  view.question.classList.add("edited");
  fill(view.exchange.question);
}

function stopEditing() {
  if (!editing) return;
  editing.question.classList.remove("edited");
  editing = null;
  byId("editing").hidden = true;
  fill(draft);
}

function fill(text) {
  field.value = text;
  fitField();
  field.focus();
}

/** Let the field be as high as its text; the style sheet says how high at most. */
function fitField() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

/** On a touch screen Enter begins a new line: there is no Shift to hold, but a button beside it. */
const isTouched = window.matchMedia("(hover: none) and (pointer: coarse)");

/** 229 is all that some browsers say of a composition's last key. */
const isComposing = ({ isComposing, keyCode }) => isComposing || keyCode === 229;

function pressed(event) {
  if (isComposing(event)) return;
  if (event.key === "ArrowUp" && !field.value && !running && views.length > 0) {
    event.preventDefault();
    edit(views.at(-1));
  }
  if (event.key !== "Enter" || event.shiftKey || isTouched.matches) return;
  event.preventDefault();
  form.requestSubmit();
}

/** What the buttons in an exchange do; they know themselves by their first class. */
const ACTIONS = {
  "copy-code": (view, button) =>
    copyFor(button, button.closest(".code").querySelector("pre").textContent, announce),
  "copy-reply": ({ exchange }, button) => copyFor(button, exchange.reply, announce),
  retry: (view) => ask(view.exchange.question, view),
  "go-on": () => ask("Go on where you stopped."),
  edit,
};

function clickedInLog({ target }) {
  const button = target.closest("button");
  const view = views.find(({ elements }) => elements.some((element) => element.contains(button)));
  if (!button || !view) return;
  ACTIONS[button.classList[0]](view, button);
  if (!button.isConnected) field.focus();
}

form.addEventListener("submit", submit);
field.addEventListener("keydown", pressed);
field.addEventListener("input", fitField);
log.addEventListener("click", clickedInLog);
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", startOver);
byId("cancel").addEventListener("click", () => stopEditing());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || isComposing(event)) return;
  if (running) stop();
  else stopEditing();
});
byId("welcome").addEventListener("click", ({ target }) => {
  if (!target.matches(".example")) return;
  ask(target.textContent.trim());
  field.focus();
});
/** Nothing may run after the page was hidden; the service keeps its reply for a while. */
document.addEventListener("visibilitychange", () => conversation.save());

byId("welcome").hidden = conversation.exchanges.length > 0;
document.body.dataset.state = "idle";
for (const exchange of conversation.exchanges) add(exchange);
if (views.at(-1)?.isRunning) follow(views.at(-1), false);
fitField();
