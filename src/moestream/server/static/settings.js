// The dialog of settings, and what they mean for a request.

import { apiKey, keyRemembered, setApiKey } from "./api.js";
import { $ } from "./dom.js";
import { loadSettings, saveSettings } from "./storage.js";

const PENALTIES = ["repetition_penalty", "presence_penalty", "frequency_penalty"];
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", ...PENALTIES, "max_tokens", "seed"];
const TEXTS = ["system", "thinking", "theme", "tools"];

let settings = loadSettings();

function applyTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

/** Parameters of a request besides model and messages. */
export function parameters() {
  const found = {};
  for (const name of NUMBERS) if (settings[name] !== undefined) found[name] = settings[name];
  if (settings.thinking) found.reasoning_effort = settings.thinking;
  if (settings.tools) found.tools = JSON.parse(settings.tools);
  return found;
}

export function systemPrompt() {
  return settings.system ?? "";
}

/** Why a text is no list of tools, or an empty text. */
function toolsProblem(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "Tools must be a list: [ … ]";
  } catch (error) {
    return `Tools are not valid JSON: ${error.message}`;
  }
}

export class SettingsDialog {
  /** onsave is called when settings have changed. */
  constructor(onsave) {
    this.dialog = $("settings");
    this.form = this.dialog.querySelector("form");
    this.form.addEventListener("submit", (event) => {
      if (event.submitter?.value !== "cancel" && !this.save()) event.preventDefault();
      else if (event.submitter?.value !== "cancel") onsave();
    });
    $("reset").addEventListener("click", () => {
      for (const name of [...NUMBERS, ...TEXTS]) this.form.elements[name].value = "";
    });
    applyTheme();
  }

  /** Open, with a reason if the server wants something. */
  open(reason = "", field = "system") {
    if (this.dialog.open) return;
    const fields = this.form.elements;
    for (const name of [...NUMBERS, ...TEXTS]) fields[name].value = settings[name] ?? "";
    fields.key.value = apiKey();
    fields.remember.checked = keyRemembered();
    $("settings-error").textContent = reason;
    this.dialog.showModal();
    fields[field].focus();
  }

  save() {
    const fields = this.form.elements;
    const problem = toolsProblem(fields.tools.value);
    $("settings-error").textContent = problem;
    if (problem) {
      fields.tools.focus();
      return false;
    }
    settings = {};
    for (const name of NUMBERS) if (fields[name].value !== "") settings[name] = Number(fields[name].value);
    for (const name of TEXTS) if (fields[name].value.trim()) settings[name] = fields[name].value;
    saveSettings(settings);
    setApiKey(fields.key.value.trim(), fields.remember.checked);
    applyTheme();
    return true;
  }
}
