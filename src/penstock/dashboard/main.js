// The page's clock: asks for status and history once a second while somebody looks, one request at a time,
// less often where nobody answers. What was last heard stays on the page, marked as old.

import * as api from "./api.js";
import { byId } from "./dom.js";
import { showCache } from "./cache.js";
import { startChat } from "./chat.js";
import { showEvents } from "./events.js";
import { showHead, showSilence } from "./head.js";
import { LoadLine } from "./loadline.js";
import { showRequests } from "./requests.js";
import { showSetups } from "./setups.js";

const EVERY = 1000;
const SLOWEST = 15000;

const main = /** @type {HTMLElement} */ (document.querySelector("main"));
const keyForm = /** @type {HTMLFormElement} */ (byId("keyform"));
const keyField = /** @type {HTMLInputElement} */ (byId("key"));
const line = new LoadLine();

let timer = 0;
let asking = false;
let failures = 0;
let locked = false;
/** @type {import("./shapes.js").Status | null} */
let last = null;

/** Asks once and shows what came; then waits for the next time. */
async function look() {
  clearTimeout(timer);
  if (asking || locked || document.hidden) return;
  asking = true;
  try {
    const status = await api.status();
    if (last && Math.abs(born(status) - born(last)) > 5) line.forget(); // another process, or a machine that slept
    line.add(await api.history(line.newest()));
    last = status;
    failures = 0;
    show(status);
  } catch (error) {
    fail(error);
  } finally {
    asking = false;
    timer = setTimeout(look, wait());
  }
}

const wait = () => (failures ? Math.min(EVERY * 2 ** failures, SLOWEST) : EVERY);

/** @param {import("./shapes.js").Status} status */
const born = (status) => status.time - status.uptime;

/** @param {import("./shapes.js").Status} status */
function show(status) {
  main.hidden = false;
  document.body.classList.remove("stale");
  showHead(status);
  line.show(status);
  showRequests(status, look);
  showCache(status, look);
  showEvents(status);
  showSetups(status);
}

/** @param {unknown} error */
function fail(error) {
  if (!(error instanceof api.Refused)) throw error;
  if (error.status === 401) {
    locked = true;
    byId("keyerror").textContent = api.hasKey() ? "That is not the key of this server." : "";
    main.hidden = true;
    keyForm.hidden = false;
    byId("strip").hidden = true;
    keyField.select();
    keyField.focus();
    return;
  }
  failures += 1;
  showSilence(last, error, wait() / 1000);
  document.body.classList.add("stale");
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(keyField.value.trim());
  locked = false;
  keyForm.hidden = true;
  byId("strip").hidden = false;
  look();
});
document.addEventListener("visibilitychange", look);
byId("retry").addEventListener("click", look);
startChat(() => last?.model ?? "");
look();
