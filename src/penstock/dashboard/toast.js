// A passing word on what the person did, also for who listens.

import { byId } from "./dom.js";

const SECONDS = 5;
let timer = 0;

/** @param {string} text */
export function toast(text) {
  byId("toast").textContent = text;
  clearTimeout(timer);
  timer = setTimeout(() => (byId("toast").textContent = ""), SECONDS * 1000);
}
