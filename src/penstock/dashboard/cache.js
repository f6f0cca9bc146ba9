// The prompt cache: how much it holds and spares, and its tree. A line is indented only where the tree forks.

import * as api from "./api.js";
import { byId, bytes, count, make, percent, plural, reconcile, say } from "./dom.js";
import { toast } from "./toast.js";

/** @typedef {import("./shapes.js").Prefix} Prefix */
/** @typedef {import("./shapes.js").Status} Status */

const DEEPEST = 6;
const NOTHING = "No prefix is kept yet. What prompts have in common is stored here once.";
/** @type {Record<string, string>} */
const REASONS = { memory: "to requests", budget: "to a smaller budget", caps: "to its own limits", cleared: "by hand" };

let seen = () => {};

/** @param {Status} status @param {() => void} look asks for the status anew */
export function showCache(status, look) {
  const { cache } = status;
  seen = look;
  say(byId("cache-size"), `${bytes(cache.bytes)} in ${plural(cache.entries, "sequence")}`);
  const share = `${percent(cache.hits, cache.queries)} of all prompt tokens came from it`;
  const figures = `${count(cache.hits)} of ${count(cache.queries)}`;
  say(byId("hits"), cache.queries ? `${share} (${figures}).` : "No prompt has been looked up yet.");
  const gone = Object.entries(cache.evicted).filter(([, size]) => size > 0);
  const given = gone.map(([reason, size]) => `${bytes(size)} ${REASONS[reason] ?? reason}`).join(", ");
  say(byId("evicted"), given ? `Given up since the start: ${given}.` : "");
  byId("bare").hidden = cache.tree.length > 0;
  say(byId("bare"), cache.bytes ? "The list comes with the engine's next report." : NOTHING);
  /** @type {HTMLButtonElement} */ (byId("clear")).disabled = cache.nodes === 0 && cache.bytes === 0;
  const depths = indents(cache.tree);
  reconcile(byId("tree"), cache.tree, (node) => String(node.id), row, (made, node) => {
    const depth = String(Math.min(depths.get(node.id) ?? 0, DEEPEST));
    made.dataset.depth = depth;
    made.style.setProperty("--depth", depth);
    const cells = [range(node), bytes(node.bytes), count(node.hits), used(node)];
    cells.forEach((text, at) => say(made.children[at], text));
    made.classList.toggle("borrowed", node.borrowed);
  });
}

function row() {
  const name = make("th", { scope: "row" });
  return make("tr", {}, name, make("td"), make("td"), make("td"));
}

/** @param {Prefix} node */
const range = (node) => `${count(node.start)}–${count(node.start + node.tokens)}`;

/** @param {Prefix} node */
function used(node) {
  if (node.borrowed) return "in use";
  return node.age === 0 ? "just now" : `${plural(node.age, "request")} ago`;
}

/** How far each node is indented: by the forks above it. Parents come first. @param {Prefix[]} tree */
function indents(tree) {
  /** @type {Map<number | null, number>} */
  const children = new Map();
  for (const { parent } of tree) children.set(parent, (children.get(parent) ?? 0) + 1);
  /** @type {Map<number, number>} */
  const depths = new Map();
  for (const { id, parent } of tree) {
    const above = parent === null ? 0 : (depths.get(parent) ?? 0);
    depths.set(id, above + (parent !== null && (children.get(parent) ?? 0) > 1 ? 1 : 0));
  }
  return depths;
}

const dialog = /** @type {HTMLDialogElement} */ (byId("confirm"));

byId("clear").addEventListener("click", () => {
  dialog.returnValue = "";
  dialog.showModal();
});

dialog.addEventListener("close", async () => {
  if (dialog.returnValue !== "yes") return;
  try {
    const { cleared } = await (await api.clearCache()).json();
    toast(cleared ? "The prompt cache was cleared." : "No engine is up: nothing was cached.");
  } catch (error) {
    toast(/** @type {Error} */ (error).message);
  }
  seen();
});
