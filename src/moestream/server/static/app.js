// The page: which conversation is shown, and the replies on their way.

import { ApiError, chat, models } from "./api.js";
import { $, announce, grow, newId } from "./dom.js";
import { LiveView } from "./live.js";
import { Messages } from "./messages.js";
import { parameters, SettingsDialog, systemPrompt } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { allConversations, deleteConversation, saveConversation } from "./storage.js";

const SAVE_MS = 2000;
const WIDE = matchMedia("(min-width: 1100px)");
const MIDDLE = matchMedia("(min-width: 800px)");
const OPEN = "moestream.open";

let model = null;
let conversations = [];
let current = null; // what is shown; among conversations once it has a message
const runs = new Map(); // id of a conversation -> AbortController of its reply

const messages = new Messages($("messages"), $("scroll"), {
  regenerate: () => {
    current.messages.pop();
    reply(current);
  },
  edit: (message, text) => {
    stop(current);
    current.messages.length = current.messages.indexOf(message);
    ask(text);
  },
  answer: (results) => {
    for (const { id, name, text } of results) current.messages.push({ role: "tool", tool_call_id: id, name, content: text });
    reply(current);
  },
});
const sidebar = new Sidebar($("conversations"), { open: show, rename, remove });
const settings = new SettingsDialog(connect);
const live = new LiveView();

function blank() {
  return { id: newId(), title: "New conversation", updated: Date.now(), messages: [] };
}

function keep(conversation) {
  saveConversation(conversation).catch((error) => banner(`The conversation could not be saved: ${error.message}`));
}

function banner(text) {
  $("banner").textContent = text;
  $("banner").hidden = !text;
}

function showControls() {
  const running = runs.has(current.id);
  const focused = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = running;
  $("stop").hidden = !running;
  if (focused) (running ? $("stop") : $("prompt")).focus();
  $("empty").hidden = current.messages.length > 0;
  sidebar.show(conversations, current.id, runs);
}

function show(id) {
  current = conversations.find((c) => c.id === id) ?? blank();
  sessionStorage.setItem(OPEN, current.id);
  banner("");
  messages.show(current, runs.has(current.id));
  showControls();
  if (!MIDDLE.matches) setPanel("list", false);
  $("prompt").focus();
}

function rename(id, title) {
  const conversation = conversations.find((c) => c.id === id);
  conversation.title = title;
  keep(conversation);
  showControls();
}

function remove(id) {
  const conversation = conversations.find((c) => c.id === id);
  stop(conversation);
  runs.delete(id); // its reply must not be saved any more
  conversations = conversations.filter((c) => c !== conversation);
  deleteConversation(id);
  announce("Conversation deleted");
  if (current.id === id) show(conversations[0]?.id);
  else showControls();
}

/** Messages as the API takes them. */
function wire(conversation) {
  const found = systemPrompt() ? [{ role: "system", content: systemPrompt() }] : [];
  for (const message of conversation.messages) {
    const { role, content } = message;
    if (role === "user") found.push({ role, content });
    else if (role === "tool") found.push({ role, content, tool_call_id: message.tool_call_id });
    else {
      const entry = { role, content };
      if (message.reasoning) entry.reasoning_content = message.reasoning;
      if (message.calls.length) {
        entry.tool_calls = message.calls.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.arguments } }));
      }
      found.push(entry);
    }
  }
  return found;
}

/** Add what a chunk brings to a reply. */
function take(message, chunk, began) {
  if (chunk.usage) message.receipt = chunk.usage.receipts?.[0] ?? null;
  const choice = chunk.choices[0];
  if (!choice) return;
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
  if (reasoning) message.reasoning += reasoning;
  if (content) message.content += content;
  for (const call of calls ?? []) {
    message.calls[call.index] ??= { id: call.id, name: call.function.name, arguments: "" };
    message.calls[call.index].arguments += call.function.arguments;
  }
  if (reasoning) message.thought_seconds = (performance.now() - began) / 1000;
  if (choice.finish_reason) message.finish = choice.finish_reason;
}

/** Let the model answer a conversation. */
async function reply(conversation) {
  const control = new AbortController();
  const body = { model, messages: wire(conversation), ...parameters() };
  const message = { role: "assistant", content: "", reasoning: "", calls: [], receipt: null, finish: null, error: null };
  conversation.messages.push(message);
  conversation.updated = Date.now();
  runs.set(conversation.id, control);
  keep(conversation);
  messages.show(conversation, true);
  showControls();
  announce("Replying");
  const shown = () => conversation === current;
  let saved = performance.now();
  let drawing = 0;
  const draw = () => {
    drawing = 0;
    if (shown() && runs.get(conversation.id) === control) messages.update(true);
  };
  const began = performance.now();
  try {
    for await (const chunk of chat(body, control.signal)) {
      take(message, chunk, began);
      drawing ||= requestAnimationFrame(draw);
      if (performance.now() - saved > SAVE_MS) {
        saved = performance.now();
        keep(conversation);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error.message;
    if (error instanceof ApiError && error.status === 401) settings.open(error.message, "key");
  }
  cancelAnimationFrame(drawing);
  if (runs.get(conversation.id) !== control) return; // edited or deleted meanwhile: another reply took its place
  runs.delete(conversation.id);
  keep(conversation);
  if (shown()) messages.update(false);
  showControls();
  announce(message.error ?? (message.finish === "stopped" ? "Stopped" : "The reply is complete"));
}

function stop(conversation) {
  runs.get(conversation.id)?.abort();
}

/** Send what the user wrote. */
function ask(text) {
  if (!conversations.includes(current)) {
    current.title = text.trim().split("\n")[0].slice(0, 60);
    conversations.unshift(current);
  }
  sessionStorage.setItem(OPEN, current.id);
  current.messages.push({ role: "user", content: text });
  reply(current);
}

function setPanel(name, open) {
  $(name).hidden = !open;
  $(`toggle-${name}`).ariaExpanded = String(open);
  if (name === "live") live.setOpen(open);
  if (open && !MIDDLE.matches) setPanel(name === "live" ? "list" : "live", false); // one at a time on a phone
}

/** Ask the server for its model, until it is there. */
async function connect() {
  live.restart();
  try {
    [model] = await models();
    $("model").textContent = model;
    document.title = `${model} · moestream`;
    $("send").disabled = false;
    banner("");
  } catch (error) {
    model = null;
    $("send").disabled = true;
    if (error.status === 401) settings.open(error.message, "key");
    banner(error.status === 503 ? "The model is being loaded…" : error.message);
    if (error.status !== 401) setTimeout(connect, 1500);
  }
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("prompt").value;
    if (!text.trim() || !model || runs.has(current.id)) return;
    $("prompt").value = "";
    grow($("prompt"));
    ask(text);
  });
  $("prompt").addEventListener("input", () => grow($("prompt")));
  $("prompt").addEventListener("keydown", (event) => {
    const phone = matchMedia("(pointer: coarse)").matches; // there Enter is the only way to begin a line
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !phone) {
      event.preventDefault();
      $("composer").requestSubmit();
    }
  });
  $("stop").addEventListener("click", () => stop(current));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("settings").open) stop(current);
  });
  $("new").addEventListener("click", () => show(null));
  $("open-settings").addEventListener("click", () => settings.open());
  for (const name of ["list", "live"]) {
    $(`toggle-${name}`).addEventListener("click", () => setPanel(name, $(name).hidden));
  }
  $("close-live").addEventListener("click", () => {
    setPanel("live", false);
    $("toggle-live").focus();
  });
  $("enlarge").addEventListener("click", () => {
    const large = $("columns").classList.toggle("large");
    $("enlarge").ariaPressed = String(large);
    setPanel("list", !large);
  });
}

async function start() {
  listen();
  setPanel("list", MIDDLE.matches);
  setPanel("live", WIDE.matches);
  try {
    conversations = await allConversations();
  } catch (error) {
    banner(`Conversations cannot be kept: ${error.message}`);
  }
  show(sessionStorage.getItem(OPEN));
  connect();
}

start();
