// Set-ups of clients, ready to paste: docs/clients.md tells what was run with them.

import { base, hasKey } from "./api.js";
import { byId, make, say } from "./dom.js";

/** A set-up: where the text goes, and the text. @typedef {{ where: string, text: string }} Setup */

/** @param {string} model @param {number} context @returns {Record<string, Setup>} */
function texts(model, context) {
  const key = hasKey() ? "YOUR_KEY" : "none";
  const name = JSON.stringify(model);
  const question = JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] });
  const opencode = {
    provider: {
      penstock: {
        npm: "@ai-sdk/openai-compatible",
        name: "Penstock",
        options: { baseURL: `${base}/v1`, apiKey: key },
        models: { [model]: { name: model, limit: { context, output: Math.min(8192, context) } } },
      },
    },
    model: `penstock/${model}`,
  };
  return {
    curl: {
      where: "In a terminal",
      text: [
        `curl ${base}/v1/chat/completions \\`,
        `  -H 'Content-Type: application/json' \\`,
        ...(hasKey() ? [`  -H 'Authorization: Bearer ${key}' \\`] : []),
        `  -d '${question.replaceAll("'", "'\\''")}'`,
      ].join("\n"),
    },
    Python: {
      where: "With the openai package",
      text: [
        "from openai import OpenAI",
        "",
        `client = OpenAI(base_url="${base}/v1", api_key="${key}")`,
        "answer = client.chat.completions.create(",
        `    model=${name},`,
        '    messages=[{"role": "user", "content": "Hello"}],',
        ")",
        "print(answer.choices[0].message.content)",
      ].join("\n"),
    },
    "Claude Code": {
      where: "In a terminal",
      text: `ANTHROPIC_BASE_URL=${base} ANTHROPIC_AUTH_TOKEN=${key} claude`,
    },
    Codex: {
      where: "In ~/.codex/config.toml",
      text: [
        `model = ${name}`,
        'model_provider = "penstock"',
        `model_context_window = ${context}`,
        "",
        "[model_providers.penstock]",
        'name = "Penstock"',
        `base_url = "${base}/v1"`,
        'wire_api = "responses"',
        ...(hasKey() ? ['env_key = "PENSTOCK_API_KEY"  # the variable that holds the key'] : []),
      ].join("\n"),
    },
    opencode: { where: "In opencode.json", text: JSON.stringify(opencode, null, 2) },
  };
}

const code = make("code");
const where = make("span");
const copy = make("button", { type: "button" }, "Copy");
/** @type {HTMLButtonElement[]} */
let tabs = [];
let chosen = "curl";
/** @type {Record<string, Setup>} */
let shown = {};

/** @param {import("./shapes.js").Status} status */
export function showSetups(status) {
  const facts = status.facts;
  const context = facts ? Math.min(facts.context_length, facts.longest || facts.context_length) : 32768;
  shown = texts(status.model, context);
  if (tabs.length === 0) begin();
  choose(chosen);
}

function begin() {
  tabs = Object.keys(shown).map((name) => make("button", { type: "button", role: "tab", "aria-controls": "setup" }, name));
  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => choose(tab.textContent ?? ""));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(at + step + tabs.length) % tabs.length];
      choose(next.textContent ?? "");
      next.focus();
    });
  });
  byId("tabs").append(...tabs);
  byId("setup").append(make("div", { class: "line" }, where, copy), make("pre", {}, code));
}

/** @param {string} name */
function choose(name) {
  chosen = name;
  for (const tab of tabs) {
    const here = tab.textContent === name;
    tab.setAttribute("aria-selected", String(here));
    tab.tabIndex = here ? 0 : -1;
  }
  byId("setup").setAttribute("aria-label", name);
  say(where, shown[name].where);
  say(code, shown[name].text);
}

copy.addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(code.textContent ?? "");
    copy.textContent = "Copied";
  } catch {
    getSelection()?.selectAllChildren(code); // no clipboard without https, but for this machine: Ctrl-C takes it
    copy.textContent = "Selected";
  }
  setTimeout(() => (copy.textContent = "Copy"), 2000);
});
