// A chat to try the model. What was typed lives in this module's memory until the page goes.

import * as api from "./api.js";
import { byId, count, duration, make, percent, plural } from "./dom.js";

/** @typedef {{ role: string, content: string }} Message */
/** @typedef {{ completion_tokens: number, prompt_tokens: number, prompt_tokens_details?: { cached_tokens: number } }} Usage */

const talk = byId("talk");
const greeting = talk.firstElementChild ?? "";
const form = /** @type {HTMLFormElement} */ (byId("chat"));
const field = /** @type {HTMLTextAreaElement} */ (byId("message"));
const [send, stop, fresh] = ["send", "stop", "fresh"].map((id) => /** @type {HTMLButtonElement} */ (byId(id)));

/** @type {Message[]} */
let messages = [];
/** @type {AbortController | null} */
let running = null;

/** @param {() => string} model */
export function startChat(model) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running && field.value.trim()) answer(model(), field.value.trim());
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  stop.addEventListener("click", () => running?.abort());
  fresh.addEventListener("click", () => {
    running?.abort();
    messages = [];
    talk.replaceChildren(greeting);
    fresh.disabled = true;
    field.focus();
  });
}

/** @param {boolean} busy */
function turn(busy) {
  const focused = document.activeElement;
  send.hidden = busy;
  stop.hidden = !busy;
  fresh.disabled = false;
  if (focused === send) stop.focus();
  if (focused === stop) field.focus();
}

/** Asks for an answer and writes it down as it comes. @param {string} model @param {string} question */
async function answer(model, question) {
  const control = new AbortController();
  running = control;
  const asked = messages;
  asked.push({ role: "user", content: question });
  field.value = "";
  turn(true);
  const view = bubbles(question);
  const begun = performance.now();
  let [first, text, reasoning, ending] = [0, "", "", ""];
  /** @type {Usage | null} */
  let usage = null;
  try {
    const body = { model, messages: asked, stream: true, stream_options: { include_usage: true }, return_progress: true };
    for await (const chunk of api.stream("/v1/chat/completions", body, control.signal)) {
      const { prompt_progress: progress } = chunk;
      const choice = chunk.choices?.[0];
      const thought = choice?.delta?.reasoning_content ?? "";
      const said = choice?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
      ending = choice?.finish_reason ?? ending;
      if (progress) view.state.textContent = `Reading the prompt, ${percent(progress.processed, progress.total)}`;
      if (!thought && !said) continue;
      first ||= performance.now();
      reasoning += thought;
      text += said;
      view.write(text, reasoning);
    }
    view.state.textContent = summary(usage, begun, first, ending);
  } catch (error) {
    view.state.textContent = control.signal.aborted ? "Stopped." : /** @type {Error} */ (error).message;
    view.state.classList.toggle("failed", !control.signal.aborted);
  }
  if (text) asked.push({ role: "assistant", content: text });
  else asked.pop();
  byId("told").textContent = view.state.textContent;
  if (running === control) {
    running = null;
    turn(false);
  }
}

/** @param {string} question */
function bubbles(question) {
  const text = make("p", { class: "text" });
  const thoughts = make("p", { class: "text" });
  const folded = make("details", {}, make("summary", {}, "Reasoning"), thoughts);
  folded.hidden = true;
  if (talk.firstElementChild === greeting) talk.replaceChildren();
  const state = make("p", { class: "state" }, "Waiting");
  talk.append(make("div", { class: "asked" }, make("p", { class: "text" }, question)));
  talk.append(make("div", { class: "said" }, folded, text, state));
  const follow = () => (talk.scrollTop = talk.scrollHeight);
  follow();
  return {
    state,
    /** @param {string} said @param {string} thought */
    write(said, thought) {
      const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
      text.textContent = said;
      thoughts.textContent = thought;
      folded.hidden = !thought;
      state.textContent = said ? "Writing" : "Reasoning";
      if (atEnd) follow();
    },
  };
}

/** @param {Usage | null} usage @param {number} begun @param {number} first @param {string} ending */
function summary(usage, begun, first, ending) {
  if (!usage) return "";
  const seconds = (performance.now() - (first || begun)) / 1000;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const parts = [
    plural(usage.completion_tokens, "token"),
    `${(usage.completion_tokens / Math.max(seconds, 0.001)).toFixed(1)} tok/s`,
    `${count(cached)} of ${plural(usage.prompt_tokens, "prompt token")} cached`,
    `first after ${duration(((first || performance.now()) - begun) / 1000)}`,
  ];
  return (ending === "length" ? "Cut off at the length limit · " : "") + parts.join(" · ");
}
