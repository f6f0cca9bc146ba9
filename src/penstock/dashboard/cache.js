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
  reconcile(byId("tree"), branches(cache.tree), ({ node }) => String(node.id), row, (made, { node, depth }) => {
    made.dataset.depth = String(Math.min(depth, DEEPEST));
    made.style.setProperty("--depth", made.dataset.depth);
    const cells = [range(node), node.bytes ? bytes(node.bytes) : "–", count(node.hits), used(node)];
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

/**
 * The tree line by line, each node below the one it hangs from, indented where that one forks.
 * @param {Prefix[]} tree @returns {{ node: Prefix, depth: number }[]}
 */
function branches(tree) {
  /** @param {number | null} parent @param {number} depth @returns {{ node: Prefix, depth: number }[]} */
  const below = (parent, depth) => {
    const children = tree.filter((node) => node.parent === parent);
    const step = parent !== null && children.length > 1 ? 1 : 0;
    return children.flatMap((node) => [{ node, depth: depth + step }, ...below(node.id, depth + step)]);
  };
  return below(null, 0);
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
