// What went wrong, or is worth knowing, with what can be done about it.

import { byId, clock, duration, make, reconcile, say } from "./dom.js";

/** @type {Record<string, [string, string]>} */
const LEVELS = { error: ["✕", "Error"], warning: ["!", "Warning"], info: ["i", "Note"] };

/** @param {import("./shapes.js").Status} status */
export function showEvents(status) {
  const list = byId("events");
  list.hidden = status.events.length === 0;
  byId("uneventful").hidden = !list.hidden;
  reconcile(
    list,
    status.events,
    (event) => `${event.kind} ${event.time} ${event.message}`,
    (event) => {
      const [sign, name] = LEVELS[event.level] ?? LEVELS.info;
      const badge = make("span", { class: "badge", role: "img", "aria-label": name }, sign);
      const words = make("div", {}, make("p", { class: "what" }, event.message));
      if (event.advice) words.append(make("p", { class: "advice" }, event.advice));
      const when = make("time", { datetime: new Date(event.time * 1000).toISOString(), title: clock(event.time) });
      const made = make("li", { "data-level": event.level }, badge, words, when);
      return made;
    },
    (made, event) => {
      const times = event.count > 1 ? `${event.count} ×, ` : "";
      say(/** @type {Element} */ (made.lastElementChild), `${times}${duration(status.time - event.time)} ago`);
    },
  );
}
