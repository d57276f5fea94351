// Markdown to elements. Whatever a model writes goes through DOMPurify, and HTML in it is shown, not used.

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";
import { copy, h } from "./dom.js";

const CLEAN = {
  ALLOWED_TAGS:
    "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong del a table thead tbody tr th td".split(" "),
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => (/^<br\s*\/?>$/i.test(text.trim()) ? "<br>" : escaped(text)),
    image: ({ text, href }) => escaped(text || href), // nothing is fetched because a model says so
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
  const kept = node.tagName === "CODE" && node.className.match(/^language-[\w+#.-]{1,30}$/);
  if (!kept) node.removeAttribute("class");
});

/** One block of Markdown as elements. */
function block(tokens) {
  const fragment = DOMPurify.sanitize(marked.parser(tokens), CLEAN);
  for (const pre of fragment.querySelectorAll("pre")) {
    const language = pre.firstElementChild?.className.replace("language-", "") ?? "";
    const button = h("button", { type: "button", class: "copy", onclick: () => copy(pre.textContent) }, "Copy");
    const code = h("div", { class: "code" }, h("div", { class: "bar" }, h("span", {}, language), button));
    pre.replaceWith(code);
    pre.tabIndex = 0; // scrolls sideways
    code.append(pre);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

/** Shows a text that grows; blocks that did not change are left alone. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.blocks = []; // {raw, nodes}
    this.spoken = 0;
  }

  /** Show the text; returns the text of blocks that have become complete. */
  update(text, complete) {
    const tokens = marked.lexer(text);
    let same = 0;
    while (same < this.blocks.length && same < tokens.length && this.blocks[same].raw === tokens[same].raw) same += 1;
    for (const { nodes } of this.blocks.splice(same)) for (const node of nodes) node.remove();
    for (const token of tokens.slice(same)) {
      const fragment = block(Object.assign([token], { links: tokens.links }));
      const nodes = [...fragment.childNodes];
      this.root.append(fragment);
      this.blocks.push({ raw: token.raw, nodes });
    }
    const until = complete ? this.blocks.length : this.blocks.length - 1;
    const done = this.blocks.slice(this.spoken, Math.max(this.spoken, until));
    this.spoken += done.length;
    return done.map(({ nodes }) => nodes.map((node) => node.textContent).join(" ").trim()).filter(Boolean);
  }
}
