// The load line: memory by owner over time, stacked, against the budget. Drawn by hand, as areas of one SVG.
// The legend shows the numbers of now, or of the moment under the pointer or chosen with the arrow keys.

import { byId, bytes, clock, count, draw, duration, make, say } from "./dom.js";

/** @typedef {import("./shapes.js").Status} Status */
/** @typedef {{ time: number, budget: number | null, owners: Record<string, number>, held: number,
 *   running: number, queued: number, read: number, written: number }} Sample */

/** Owners from the bottom up, by name and by what they are. */
const OWNERS = [
  ["weights", "weights", "The model itself"],
  ["live_kv", "requests", "Keys and values of the requests on board"],
  ["states", "states", "Recurrent states of the requests on board"],
  ["cached", "cache", "Prefixes kept for later prompts; they give way to requests"],
  ["grammars", "grammars", "Compiled grammars of structured answers"],
  ["transient", "step", "What the step under way is given to compute in"],
  ["pool", "pool", "Freed buffers that the allocator keeps for its next need"],
];
const RARE = ["states", "grammars"]; // told of where there are any
/** @type {Record<string, [string, string]>} */
const MARKS = { eviction: ["△", "evicted from the cache"], preemption: ["◇", "gave way"], death: ["✕", "engine died"] };
const KEPT = 600; // seconds
const GAP = 5; // seconds without a sample that are shown as such
const WINDOWS = [60, 120, 240, 600];
const LEFT = 58;
const RIGHT = 14;
const TOP = 20;
const BOTTOM = 38;

export class LoadLine {
  constructor() {
    /** @type {Sample[]} */
    this.samples = [];
    /** @type {import("./shapes.js").Mark[]} */
    this.marks = [];
    /** @type {Status | null} */
    this.status = null;
    /** The chosen moment, in Unix time; null: now. @type {number | null} */
    this.chosen = null;
    /** Whether the scale reaches the ceiling; null: as the numbers suggest. @type {boolean | null} */
    this.whole = null;
    this.isWhole = true;
    this.plot = byId("plot");
    this.values = legend();
    this.listen();
  }

  listen() {
    const { plot } = this;
    new ResizeObserver(() => this.draw()).observe(plot);
    plot.addEventListener("pointermove", (event) => this.choose(this.timeAt(event.offsetX)));
    plot.addEventListener("pointerdown", (event) => this.choose(this.timeAt(event.offsetX)));
    plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.choose(null));
    plot.addEventListener("blur", () => this.choose(null));
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -30, PageDown: 30 }[event.key];
      if (step) this.choose((this.chosen ?? this.newest()) + step);
      else if (event.key === "Escape") this.choose(null);
      else return;
      event.preventDefault();
    });
    byId("scale").addEventListener("click", () => {
      this.whole = !this.isWhole;
      this.draw();
    });
  }

  /** The time of the last sample; 0: there is none. */
  newest() {
    return this.samples.at(-1)?.time ?? 0;
  }

  /** What was drawn is another process's. */
  forget() {
    this.samples = [];
    this.marks = [];
  }

  /** @param {import("./shapes.js").History} history later than what is here */
  add(history) {
    history.time.forEach((time, at) => {
      const owners = Object.fromEntries(OWNERS.map(([owner]) => [owner, history.owners[owner]?.[at] ?? 0]));
      const held = Object.values(owners).reduce((sum, size) => sum + size, 0);
      const [running, queued] = [history.running[at], history.queued[at]];
      const [read, written] = [history.prompt_tokens[at], history.generated_tokens[at]];
      this.samples.push({ time, budget: history.budget[at], owners, held, running, queued, read, written });
    });
    this.samples = this.samples.filter((sample) => sample.time > this.newest() - KEPT);
    this.marks = [...this.marks, ...history.marks].filter((mark) => mark.time >= this.samples[0]?.time);
  }

  /** @param {Status} status */
  show(status) {
    this.status = status;
    const { held, budget, budget_decided_by: by, ceiling, ceiling_decided_by: limit } = status.memory;
    const away = Object.keys(status.memory.owners).length === 0;
    const below = budget === null ? "held" : `held, ${bytes(Math.max(0, budget - held))} below the load line`;
    say(byId("held"), away ? "" : bytes(held));
    say(byId("room"), away ? "the engine has not said yet what it holds" : below);
    const line = budget === null ? "" : `Load line: ${bytes(budget)}, set by ${by}.`;
    const most = ceiling === null ? "" : ` Ceiling: ${bytes(ceiling)}, set by ${limit}.`;
    const front = status.memory.front_held ? ` The HTTP process holds ${bytes(status.memory.front_held)} beside it.` : "";
    say(byId("limits"), line + most + front);
    this.draw();
  }

  /** @param {number | null} time */
  choose(time) {
    const now = this.newest();
    this.chosen = time === null || time >= now ? null : Math.max(time, this.begin());
    byId("moment").setAttribute("aria-live", document.activeElement === this.plot ? "polite" : "off");
    this.draw();
  }

  /** When the picture begins. */
  begin() {
    const age = this.newest() - (this.samples[0]?.time ?? 0);
    return this.newest() - (WINDOWS.find((window) => window >= age) ?? KEPT);
  }

  /** @param {number} x */
  timeAt(x) {
    const share = (x - LEFT) / (this.plot.clientWidth - LEFT - RIGHT);
    return this.begin() + share * (this.newest() - this.begin());
  }

  /** The sample of the chosen moment, or the last. */
  at() {
    const time = this.chosen ?? this.newest();
    return this.samples.findLastIndex((sample) => sample.time <= time + 0.5);
  }

  draw() {
    const [width, height] = [this.plot.clientWidth, this.plot.clientHeight];
    if (!this.status || width < 100) return;
    if (!this.samples.some((sample) => sample.held || sample.budget)) {
      const words = "The picture begins when the engine first tells what it holds.";
      this.plot.replaceChildren(make("p", { class: "empty" }, words));
      return;
    }
    const top = this.top();
    const [begin, end] = [this.begin(), this.newest()];
    const x = (/** @type {number} */ time) => LEFT + ((time - begin) / (end - begin)) * (width - LEFT - RIGHT);
    const y = (/** @type {number} */ size) => height - BOTTOM - (Math.min(size, top) / top) * (height - TOP - BOTTOM);
    const picture = draw("svg", { width, height, "aria-hidden": "true" });
    picture.append(...this.axes(x, y, top, width));
    picture.append(...this.areas(x, y), ...this.limits(x, y, top), ...this.signs(x, y));
    picture.append(draw("path", { class: "grid", d: `M${LEFT} ${y(0)}H${width - RIGHT}` }));
    if (this.chosen !== null) {
      const here = x(this.samples[Math.max(0, this.at())].time);
      picture.append(draw("path", { class: "cursor", d: `M${here} ${TOP}V${height - BOTTOM}` }));
    }
    this.plot.replaceChildren(picture);
    byId("scale").hidden = false;
    this.tell();
  }

  /** The top of the scale, in bytes: the ceiling, or what was held where that is little of it. */
  top() {
    const most = Math.max(...this.samples.map((sample) => sample.held), 1);
    const { budget, ceiling } = /** @type {Status} */ (this.status).memory;
    const limit = Math.max(budget ?? 0, ceiling ?? 0, ...this.samples.map((sample) => sample.budget ?? 0));
    this.isWhole = limit > 0 && (this.whole ?? (most === 1 || most > 0.3 * limit));
    say(byId("scale"), this.isWhole ? "Zoom in" : "Show the whole budget");
    return this.isWhole ? Math.max(limit, most) * 1.04 : 4 * nice((most * 1.15) / 4);
  }

  /** @param {(t: number) => number} x @param {(s: number) => number} y @param {number} top @param {number} width */
  axes(x, y, top, width) {
    const step = nice(top / 4.2);
    const made = [];
    for (let size = 0; size <= top; size += step) {
      made.push(draw("path", { class: "grid", d: `M${LEFT} ${y(size)}H${width - RIGHT}` }));
      made.push(draw("text", { x: LEFT - 8, y: y(size) + 4, "text-anchor": "end" }, axis(size, step)));
    }
    const [begin, end] = [this.begin(), this.newest()];
    const every = (end - begin) / (width < 500 ? 2 : end - begin > 240 ? 5 : 4);
    for (let ago = 0; ago <= end - begin; ago += every) {
      const anchor = ago === 0 ? "end" : ago === end - begin ? "start" : "middle";
      const text = ago === 0 ? "now" : `−${ago < 60 ? `${ago} s` : `${Number((ago / 60).toFixed(1))} min`}`;
      made.push(draw("text", { x: x(end - ago), y: y(0) + 32, "text-anchor": anchor }, text));
    }
    return made;
  }

  /** @param {(t: number) => number} x @param {(s: number) => number} y */
  areas(x, y) {
    const made = [];
    const labels = [];
    let below = this.samples.map(() => 0);
    for (const [owner, name] of OWNERS) {
      const above = below.map((size, at) => size + this.samples[at].owners[owner]);
      let path = "";
      for (const [from, to] of this.runs()) {
        const times = this.samples.slice(from, to).map((sample) => x(sample.time).toFixed(1));
        const over = times.map((time, at) => `${time} ${y(above[from + at]).toFixed(1)}`);
        const under = times.map((time, at) => `${time} ${y(below[from + at]).toFixed(1)}`);
        path += `M${over.join("L")}L${under.reverse().join("L")}Z`;
      }
      made.push(draw("path", { class: `area ${owner}`, d: path }));
      const last = this.samples.flatMap(({ time }, at) => (x(time) > x(this.newest()) - 75 ? [at] : []));
      const room = Math.min(...last.map((at) => y(below[at]) - y(above[at])));
      const middle = (y(Math.max(...last.map((at) => below[at]))) + y(Math.min(...last.map((at) => above[at])))) / 2;
      const place = { class: `name ${owner}`, x: x(this.newest()) - 8, y: middle + 4, "text-anchor": "end" };
      if (room > 15 && last.length > 1) labels.push(draw("text", place, name));
      below = above;
    }
    return [...made, ...labels];
  }

  /** Ranges of samples without a gap. @returns {[number, number][]} */
  runs() {
    const edges = [0];
    for (let at = 1; at < this.samples.length; at += 1) {
      if (this.samples[at].time - this.samples[at - 1].time > GAP) edges.push(at);
    }
    return edges.map((from, at) => [from, edges[at + 1] ?? this.samples.length]);
  }

  /** @param {(t: number) => number} x @param {(s: number) => number} y @param {number} top */
  limits(x, y, top) {
    const { ceiling, budget } = /** @type {Status} */ (this.status).memory;
    const [start, end] = [x(this.begin()), x(this.newest())];
    if (budget === null) return [];
    const place = { class: "load", x: end - 16, "text-anchor": "end" };
    if (budget > top) return [draw("text", { ...place, y: TOP - 7 }, `load line at ${bytes(budget)}, above this picture ↑`)];
    const made = [];
    if (ceiling !== null && ceiling > budget * 1.005) {
      made.push(draw("path", { class: "ceiling", d: `M${start} ${y(ceiling)}H${end}` }));
      made.push(draw("text", { x: start + 6, y: y(ceiling) - 5 }, `ceiling ${bytes(ceiling)}`));
    }
    const known = this.samples.filter((sample) => sample.budget !== null);
    const points = known.map((sample) => `${x(sample.time).toFixed(1)} ${y(sample.budget ?? 0).toFixed(1)}`);
    const level = y(budget);
    if (points.length) made.push(draw("path", { class: "load", d: `M${points.join("L")}` }));
    made.push(draw("circle", { class: "load", cx: end, cy: level, r: 6 }), draw("path", { class: "load", d: `M${end - 11} ${level}h22` }));
    made.push(draw("text", { ...place, y: level - 7 }, `load line ${bytes(budget)}`));
    return made;
  }

  /** Marks of one kind that would touch are one sign. @param {(t: number) => number} x @param {(s: number) => number} y */
  signs(x, y) {
    const made = [];
    /** @type {Record<string, number>} */
    const taken = {};
    for (const { time, kind } of this.marks) {
      if (x(time) - (taken[kind] ?? -99) < 11) continue;
      taken[kind] = x(time);
      if (kind === "death") made.push(draw("path", { class: "mark death", d: `M${x(time)} ${TOP}V${y(0)}` }));
      const place = { class: `sign ${kind}`, x: x(time), y: y(0) + 14, "text-anchor": "middle" };
      made.push(draw("text", place, MARKS[kind]?.[0] ?? "•"));
    }
    return made;
  }

  /** The legend's numbers. */
  tell() {
    const at = Math.max(0, this.at());
    const sample = this.samples[at];
    const before = this.samples[Math.max(0, at - 5)];
    const ago = this.newest() - sample.time;
    const line = sample.budget === null ? "" : ` of ${bytes(sample.budget)}`;
    const when = this.chosen === null ? "Now" : `${clock(sample.time)}, ${duration(ago)} ago`;
    say(byId("moment"), `${when}: ${bytes(sample.held)}${line}`);
    const seconds = Math.max(1, sample.time - before.time);
    const pace = [`${sample.running} running, ${sample.queued} waiting`];
    const [read, written] = [sample.read - before.read, sample.written - before.written].map((n) => Math.round(n / seconds));
    pace.push(`${count(read)} tok/s read`, `${count(written)} tok/s written`);
    say(byId("pace"), pace.join(" · "));
    for (const [owner] of OWNERS) {
      const used = !RARE.includes(owner) || this.samples.some((one) => one.owners[owner] > 0);
      /** @type {HTMLElement} */ (this.values[owner].parentElement).hidden = !used;
      say(this.values[owner], bytes(sample.owners[owner]));
    }
    this.plot.setAttribute("aria-label", `Memory by owner over time. ${byId("moment").textContent}`);
    for (const kind of Object.keys(MARKS)) {
      const near = this.marks.filter((mark) => mark.kind === kind && (this.chosen === null || Math.abs(mark.time - sample.time) < 2));
      say(this.values[kind], count(near.reduce((sum, mark) => sum + mark.count, 0)));
    }
  }
}

/** The least of 1, 2, 2.5, 5 × 10ⁿ that is not below. @param {number} size */
function nice(size) {
  const power = 10 ** Math.floor(Math.log10(size));
  return ([1, 2, 2.5, 5].find((factor) => factor * power >= size) ?? 10) * power;
}

/** @param {number} size @param {number} step */
function axis(size, step) {
  const [unit, name] = step < 1e8 ? [1e6, "MB"] : [1e9, "GB"];
  return `${Number((size / unit).toFixed(1))} ${name}`;
}

/** Makes the legend; the places of its numbers, by owner and by mark. */
function legend() {
  /** @type {Record<string, HTMLElement>} */
  const values = {};
  for (const [owner, name, meaning] of OWNERS) {
    values[owner] = make("b");
    const item = make("li", { title: meaning }, make("i", { class: `swatch ${owner}` }), make("span", {}, name), values[owner]);
    item.hidden = RARE.includes(owner);
    byId("legend").append(item);
  }
  for (const [kind, [sign, meaning]] of Object.entries(MARKS)) {
    values[kind] = make("b");
    byId("signs").append(make("li", {}, make("i", { class: `sign ${kind}` }, sign), values[kind], " ", meaning));
  }
  return values;
}
