// The messages of a conversation as elements.

import { bytes, copy, decimal, grow, h, speak } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const ENDS = { length: "cut off by the limit of tokens", stopped: "stopped" };

/** What a reply cost, from its receipt: the line, and all of it in a table. */
function receiptView(message) {
  const receipt = message.receipt;
  const end = ENDS[message.finish];
  if (!receipt) return end ? h("p", { class: "receipt" }, end) : null;
  const facts = [];
  if (receipt.decode_tok_s !== null) facts.push(`${decimal(receipt.decode_tok_s)} tok/s`);
  if (receipt.hit_rate !== null) facts.push(`${Math.round(100 * receipt.hit_rate)} % of experts from memory`);
  if (receipt.ttft_s !== null) facts.push(`first token after ${decimal(receipt.ttft_s)} s`);
  facts.push(`${bytes(receipt.bytes_read)} read`);
  if (end) facts.push(end);
  const rows = Object.entries(receipt)
    .filter(([, value]) => value !== null && !Array.isArray(value))
    .map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, shown(value))));
  const lossy = receipt.lossy.length ? h("b", { class: "lossy" }, `Not the model as published: ${receipt.lossy.join(", ")}. `) : null;
  return h(
    "details",
    { class: "receipt" },
    h("summary", {}, lossy, facts.join(" · ")),
    h("table", {}, h("caption", {}, "Receipt"), h("tbody", {}, ...rows)),
  );
}

function shown(value) {
  return typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : String(value);
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still on its way, or the model's mistake
  }
}

/** A reply, which may still grow. */
class ReplyView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.thought = h("div", { class: "thought" });
    this.summary = h("summary", {}, "Thinking…");
    this.thinking = h("details", { class: "thinking", hidden: true }, this.summary, this.thought);
    this.text = h("div", { class: "text" });
    this.calls = h("div", { class: "calls" });
    this.foot = h("div", { class: "foot" });
    this.element = h(
      "li",
      { class: "message assistant" },
      h("h2", { class: "unseen" }, "Reply"),
      this.thinking,
      this.text,
      this.calls,
      this.foot,
    );
    this.markdown = new MarkdownView(this.text);
    this.callNodes = [];
  }

  /** Show what has come. */
  update({ running, last, aloud }) {
    const { content, reasoning, calls, thought_seconds: seconds } = this.message;
    if (reasoning) {
      this.thinking.hidden = false;
      this.thought.textContent = reasoning;
      const over = content || calls.length || !running;
      this.summary.textContent = over ? `Thought${seconds ? ` for ${decimal(seconds)} s` : ""}` : "Thinking…";
    }
    const finished = this.markdown.update(content, !running);
    if (aloud) for (const piece of finished) speak(piece);
    this.showCalls();
    this.element.classList.toggle("running", running);
    this.element.ariaBusy = String(running);
    this.foot.replaceChildren();
    if (!running) this.showFoot(last);
  }

  showCalls() {
    this.message.calls.forEach((call, index) => {
      if (!this.callNodes[index]) {
        const code = h("pre", { tabIndex: 0 });
        this.calls.append(h("section", { class: "call", "aria-label": `Call of ${call.name}` }, h("h3", {}, `Calls ${call.name}`), code));
        this.callNodes[index] = code;
      }
      this.callNodes[index].textContent = pretty(call.arguments);
    });
  }

  showFoot(last) {
    const { message, actions } = this;
    if (message.error) this.foot.append(h("p", { class: "error", role: "alert" }, message.error));
    const receipt = receiptView(message);
    const buttons = h("div", { class: "actions" });
    if (message.content) buttons.append(h("button", { type: "button", onclick: () => copy(message.content) }, "Copy"));
    if (last) buttons.append(h("button", { type: "button", onclick: () => actions.regenerate() }, message.error ? "Try again" : "Regenerate"));
    this.foot.append(...[receipt, buttons].filter(Boolean));
    if (last && message.calls.length && !message.error && message.finish !== "stopped") this.foot.append(this.resultForm());
  }

  /** Where the user writes what the called functions returned. */
  resultForm() {
    const fields = this.message.calls.map((call) => h("textarea", { rows: 2, spellcheck: false, "aria-label": `Result of ${call.name}`, placeholder: `Result of ${call.name}`, required: true }));
    const submit = (event) => {
      event.preventDefault();
      this.actions.answer(this.message.calls.map((call, index) => ({ id: call.id, name: call.name, text: fields[index].value })));
    };
    return h("form", { class: "results", onsubmit: submit }, ...fields, h("button", { type: "submit", class: "primary" }, "Send results"));
  }
}

/** What the user wrote, with a way to write it anew. */
function userView(message, actions) {
  const text = h("div", { class: "text" }, message.content);
  const edit = h("button", { type: "button" }, "Edit");
  const buttons = h("div", { class: "actions" }, edit, h("button", { type: "button", onclick: () => copy(message.content) }, "Copy"));
  const element = h("li", { class: "message user" }, h("h2", { class: "unseen" }, "You"), text, buttons);
  edit.addEventListener("click", () => {
    const area = h("textarea", { value: message.content, "aria-label": "Your message", oninput: () => grow(area) });
    const close = () => {
      form.replaceWith(text);
      buttons.hidden = false;
      edit.focus();
    };
    const submit = (event) => {
      event.preventDefault();
      if (area.value.trim()) actions.edit(message, area.value);
    };
    const keys = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    };
    const form = h(
      "form",
      { class: "edit", onsubmit: submit, onkeydown: keys },
      area,
      h("div", { class: "row" }, h("button", { type: "submit", class: "primary" }, "Send"), h("button", { type: "button", onclick: close }, "Cancel")),
    );
    text.replaceWith(form);
    buttons.hidden = true;
    grow(area);
    area.focus();
  });
  return element;
}

function toolView(message) {
  return h("li", { class: "message tool" }, h("h2", {}, `Result of ${message.name}`), h("pre", { tabIndex: 0 }, message.content));
}

/** The list of messages. */
export class Messages {
  /** actions: regenerate(), edit(message, text), answer(results) */
  constructor(list, scroller, actions) {
    this.list = list;
    this.scroller = scroller;
    this.actions = actions;
    this.reply = null;
  }

  /** Show a conversation; its last reply may be running. */
  show(conversation, running) {
    this.reply = null;
    const views = conversation.messages.map((message, index) => {
      if (message.role === "user") return userView(message, this.actions);
      if (message.role === "tool") return toolView(message);
      const last = index === conversation.messages.length - 1;
      const view = new ReplyView(message, this.actions);
      view.update({ running: running && last, last, aloud: false });
      if (last) this.reply = view;
      return view.element;
    });
    this.list.replaceChildren(...views);
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** The last reply has grown or ended. */
  update(running) {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const follow = scrollHeight - scrollTop - clientHeight < 80;
    this.reply.update({ running, last: true, aloud: true });
    if (follow) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}
