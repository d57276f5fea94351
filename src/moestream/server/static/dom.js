// Small helpers for the document. Text only ever becomes text nodes; HTML comes from markdown.js alone.

export const $ = (id) => document.getElementById(id);

/** An element; properties beginning with "on" are listeners, "aria-", "data-" and the like attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || !(name in element)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Tell a screen reader what has happened. */
export function announce(text) {
  $("status").textContent = text;
}

/** Let a screen reader read a finished piece of a reply. */
export function speak(text) {
  const log = $("spoken");
  log.append(h("p", {}, text));
  while (log.childElementCount > 20) log.firstElementChild.remove();
}

/** An id that is new here; crypto.randomUUID exists on https only. */
export function newId() {
  return Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
}

export async function copy(text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const area = h("textarea", { value: text, class: "unseen" }); // plain http, as from a phone
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce("Copied");
}

/** Let a text area be as high as its text. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

const UNITS = ["bytes", "kB", "MB", "GB", "TB"];

export function bytes(count) {
  let unit = 0;
  while (count >= 1000 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${UNITS[unit]}`;
}

export function decimal(value) {
  return value >= 100 ? Math.round(value).toString() : value.toFixed(value >= 10 ? 1 : 2);
}
