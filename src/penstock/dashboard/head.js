// The head: which model, and in words how it is. The strip is always there, so a change of state moves nothing.

import { base } from "./api.js";
import { byId, clock, count, duration, say } from "./dom.js";

/** @typedef {import("./shapes.js").Status} Status */

/** A state's tone, its name, and what it means for who sends requests. @type {Record<string, [string, string, string]>} */
const STATES = {
  ready: ["good", "Ready", ""],
  downloading: ["wait", "Downloading the model", "Requests wait until it is there."],
  loading: ["wait", "Loading the model", "Requests wait until it is there."],
  stalled: ["bad", "The engine does not move", "It is ended and started again if it stays so."],
  restarting: ["warn", "The engine is starting again", "Open streams go on when it is back."],
  unloaded: ["rest", "At rest", "The model was unloaded for want of requests; the next one loads it."],
  halted: ["bad", "The model cannot be served", "Every request is answered with an error."],
  stopping: ["warn", "The server is shutting down", ""],
};

let heard = 0;

/** @param {Status} status */
export function showHead(status) {
  heard = Date.now() / 1000;
  const [tone, name, meaning] = STATES[status.state] ?? ["warn", status.state, ""];
  const why = [status.stage && status.state !== "ready" ? status.stage : "", status.reason ?? ""];
  const sentences = [...why.filter(Boolean).map(sentence), meaning].filter(Boolean);
  strip(tone, name, sentences.join(" "));
  byId("retry").hidden = true;
  say(byId("model"), status.model);
  say(byId("version"), status.versions.penstock ?? "");
  const facts = [`up ${duration(Math.max(10, status.uptime))}`, base.replace(/^https?:\/\//, "")];
  if (status.facts) {
    const { context_length: context, longest, device } = status.facts;
    facts.unshift(device, `${count(Math.min(context, longest || context))} tokens fit`);
  }
  say(byId("facts"), facts.join(" · "));
  const load = status.running + status.queued ? `${status.running} running, ${status.queued} waiting` : name;
  document.title = `${status.state === "ready" ? load : name} · Penstock`;
}

/**
 * Nothing was told; `last` is what is still on the page.
 * @param {Status | null} last @param {import("./api.js").Refused} error @param {number} wait in seconds
 */
export function showSilence(last, error, wait) {
  const name = error.status ? "The server does not tell" : "The server cannot be reached";
  const old = last ? `What you see is from ${clock(heard)}.` : `This is ${base}.`;
  strip("bad", name, `${error.status ? `${error.message} ` : ""}${old} Next try in ${Math.round(wait)} s.`);
  byId("retry").hidden = false;
  say(byId("facts"), "");
  document.title = "No answer · Penstock";
}

/** @param {string} tone @param {string} name @param {string} detail */
function strip(tone, name, detail) {
  byId("strip").dataset.tone = tone;
  say(byId("state"), detail ? `${name}.` : name);
  say(byId("detail"), detail);
}

/** @param {string} text */
function sentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
