// The open requests, oldest first. A stop shows at once, and the row goes when the server has ended it.

import * as api from "./api.js";
import { byId, bytes, count, duration, make, part, percent, plural, reconcile, say } from "./dom.js";
import { toast } from "./toast.js";

/** @typedef {import("./shapes.js").Request} Request */
/** @typedef {import("./shapes.js").Status} Status */

const MOST = 50;
/** @type {Set<string>} */
const stopping = new Set();

/** @param {Status} status @param {() => void} look asks for the status anew */
export function showRequests(status, look) {
  const { requests, finished } = status;
  say(byId("lines"), requests.length ? `${status.running} running, ${status.queued} waiting` : "");
  const ended = [
    [(finished.stop ?? 0) + (finished.length ?? 0), "answered"],
    [finished.abort ?? 0, "stopped"],
    [finished.error ?? 0, "failed"],
  ];
  const told = ended.filter(([number]) => number).map(([number, how]) => `${count(Number(number))} ${how}`);
  say(byId("done"), told.length ? `${told.join(", ")} since the start` : "");
  byId("quiet").hidden = requests.length > 0;
  byId("requests").hidden = requests.length === 0;
  reconcile(byId("requests"), requests.slice(0, MOST), (request) => request.id, (request) => create(request, look), update);
  say(byId("more"), requests.length > MOST ? `and ${count(requests.length - MOST)} more` : "");
}

/** @param {Request} request @param {() => void} look */
function create(request, look) {
  const bar = make("div", { class: "bar", "aria-hidden": "true" }, make("i", { class: "cached" }), make("i", { class: "new" }));
  const stop = make("button", { type: "button", class: "cancel" }, "Cancel");
  stop.setAttribute("aria-label", `Cancel request ${request.id.slice(0, 8)}`);
  const made = make(
    "li",
    {},
    make("div", { class: "who" }, make("b", { class: "stage" }), make("span", { class: "from" })),
    make("div", { class: "progress" }, make("span", { class: "done" }), bar, make("span", { class: "left" })),
    make("div", { class: "prompt" }, make("span", { class: "tokens" }), make("span", { class: "why" })),
    make("div", { class: "cost" }, make("span", { class: "time" }), make("span", { class: "held" })),
    stop,
  );
  stop.addEventListener("click", async () => {
    stopping.add(request.id);
    mark(made, request);
    try {
      await api.cancel(request.id);
    } catch (error) {
      const refused = /** @type {api.Refused} */ (error);
      if (refused.status !== 404) {
        toast(`Not cancelled. ${refused.message}`);
        stopping.delete(request.id);
        mark(made, request);
      }
    }
    look();
  });
  return made;
}

/** @param {HTMLElement} made @param {Request} request */
function mark(made, request) {
  const stops = stopping.has(request.id);
  const stop = /** @type {HTMLButtonElement} */ (part(made, "cancel"));
  stop.disabled = stops;
  say(stop, stops ? "Stopping" : "Cancel");
  made.classList.toggle("stops", stops);
}

/** @param {Request} request @returns {[string, string]} */
function stage({ stage, preempted, restarts }) {
  if (stage === "queued" && preempted) return ["waiting", "Gave way"];
  if (stage === "queued") return ["waiting", restarts ? "Waits again" : "Waiting"];
  return stage === "prefill" ? ["reading", "Reading"] : ["writing", "Writing"];
}

/** @param {HTMLElement} made @param {Request} request */
function update(made, request) {
  const { prompt, cached, prefilled, generated, max_tokens: most } = request;
  const [kind, name] = stage(request);
  made.dataset.stage = kind;
  say(part(made, "stage"), name);
  say(part(made, "from"), `${request.path.replace("/v1/", "")} ${request.id.slice(0, 8)}`);
  const share = (/** @type {number} */ tokens) => `${Math.min(100, (100 * tokens) / Math.max(1, prompt))}%`;
  part(made, "cached").style.width = share(Math.min(cached, prompt));
  part(made, "new").style.width = kind === "writing" ? share(prompt - cached) : share(Math.max(0, prefilled - cached));
  say(part(made, "done"), progress(request, kind));
  say(part(made, "left"), rest(request, kind));
  say(part(made, "tokens"), `${count(prompt)} tokens = ${count(cached)} cached + ${count(prompt - cached)} new`);
  say(part(made, "why"), request.why);
  say(part(made, "time"), duration(request.seconds));
  say(part(made, "held"), request.bytes === null ? "" : bytes(request.bytes));
  part(made, "progress").title = most ? `at most ${plural(most, "token")}; ${count(generated)} written` : "";
  mark(made, request);
}

/** @param {Request} request @param {string} kind */
function progress({ prompt, prefilled, generated }, kind) {
  if (kind === "reading") return `${percent(Math.min(prefilled, prompt), prompt)} of the prompt`;
  if (kind === "waiting" && !generated) return prefilled ? `${percent(prefilled, prompt)} was read` : "not begun";
  return plural(generated, "token");
}

/** @param {Request} request @param {string} kind */
function rest({ eta, tokens_per_second: speed, restarts }, kind) {
  if (kind === "reading") return eta === null ? "" : `${duration(eta)} left`;
  if (kind === "waiting") return restarts ? "after a restart" : "";
  return speed === null ? "" : `${speed.toFixed(1)} tok/s`;
}
