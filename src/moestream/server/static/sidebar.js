// The list of conversations.

import { h } from "./dom.js";

export class Sidebar {
  /** actions: open(id), rename(id, title), remove(id) */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    this.renaming = false;
  }

  /** Show conversations; `running` holds the ids of those with a reply on its way. */
  show(conversations, current, running) {
    if (this.renaming) return; // what is typed must not be lost; the list is drawn again at the end
    this.list.replaceChildren(...conversations.map((c) => this.entry(c, c.id === current, running.has(c.id))));
  }

  entry(conversation, current, running) {
    const { id, title } = conversation;
    const open = h("button", { type: "button", class: "open", title, onclick: () => this.actions.open(id) }, title);
    if (current) open.ariaCurrent = "true";
    if (running) open.append(h("span", { class: "dot", role: "img", "aria-label": "replying" }));
    const rename = h("button", { type: "button", class: "small", "aria-label": `Rename ${title}`, title: "Rename" }, "✎");
    const remove = h("button", { type: "button", class: "small", "aria-label": `Delete ${title}`, title: "Delete" }, "✕");
    const item = h("li", {}, open, rename, remove);
    rename.addEventListener("click", () => this.rename(item, conversation));
    remove.addEventListener("click", () => {
      if (confirm(`Delete “${title}”?`)) this.actions.remove(id);
    });
    return item;
  }

  rename(item, { id, title }) {
    const field = h("input", { value: title, maxLength: 100, "aria-label": "Title" });
    this.renaming = true;
    const end = (keep) => {
      if (!this.renaming) return; // leaving the field comes after Enter, too
      this.renaming = false;
      this.actions.rename(id, (keep && field.value.trim()) || title);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "Escape") {
        event.stopPropagation();
        end(event.key === "Enter");
      }
    });
    field.addEventListener("blur", () => end(true));
    item.replaceChildren(field);
    field.focus();
    field.select();
  }
}
