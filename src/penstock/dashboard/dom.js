// Elements and numbers as people read them. Text goes in as text: nothing here, or elsewhere, parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element of that id, which the page has. @param {string} id */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return found;
}

/**
 * A new HTML element with attributes and children.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag @param {Record<string, string>} [attributes] @param {(Node | string)[]} children
 */
export function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * A new SVG element.
 * @template {keyof SVGElementTagNameMap} T
 * @param {T} tag @param {Record<string, string | number>} [attributes] @param {(Node | string)[]} children
 */
export function draw(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

/** Sets text only where it differs, so that nothing is announced or selected away twice. @param {Element} at @param {string} text */
export function say(at, text) {
  if (at.textContent !== text) at.textContent = text;
}

/** The part of `at` of that class. @param {Element} at @param {string} name @returns {HTMLElement} */
export function part(at, name) {
  const found = at.querySelector(`.${name}`);
  if (!(found instanceof HTMLElement)) throw new Error(`no part .${name}`);
  return found;
}

/**
 * Makes the children of `list` those of `items`, keeping elements (and the focus in them) by key.
 * @template T
 * @param {HTMLElement} list @param {T[]} items @param {(item: T) => string} key
 * @param {(item: T) => HTMLElement} create @param {(made: HTMLElement, item: T) => void} update
 */
export function reconcile(list, items, key, create, update) {
  const old = new Map([...list.children].map((child) => [/** @type {HTMLElement} */ (child).dataset.key, child]));
  let at = list.firstElementChild;
  for (const item of items) {
    const name = key(item);
    const made = /** @type {HTMLElement} */ (old.get(name) ?? create(item));
    old.delete(name);
    made.dataset.key = name;
    update(made, item);
    if (made === at) at = at.nextElementSibling;
    else list.insertBefore(made, at);
  }
  for (const gone of old.values()) gone.remove();
}

const whole = new Intl.NumberFormat("en-US");

/** 58211 -> "58,211". @param {number} value */
export const count = (value) => whole.format(value);

/** "20.7 GB", "150 MB", "64.0 MB". @param {number} value */
export function bytes(value) {
  if (value === 0) return "0 GB";
  if (value < 999.5e6) return `${(value / 1e6).toFixed(value < 99.95e6 ? 1 : 0)} MB`;
  return `${(value / 1e9).toFixed(1)} GB`;
}

/** "9.0 s", "41 s", "12 min", "1 h 25 min", "3 d 4 h". @param {number} seconds */
export function duration(seconds) {
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** Seconds of Unix time as the clock shows them. @param {number} time */
export const clock = (time) => new Date(time * 1000).toLocaleTimeString();

/** @param {number} part @param {number} total */
export const percent = (part, total) => (total > 0 ? `${Math.floor((100 * part) / total)} %` : "–");

/** "1 request", "2 requests". @param {number} number @param {string} noun */
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
