"use strict";
/* tools.js -- what all screens use: elements, numbers as the reader's language writes them, curves,
 * files of the program, one run after another. */

const SVG = new Set(["svg", "path", "circle", "text", "line", "title"]);

function byId(id) {
  return document.getElementById(id);
}

/* An element with attributes (a function is a listener) and children; text stays text. */
function el(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/* A model's text, without signs that steer the direction of writing or the screen. */
function harmless(text) {
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
}

/* Text in which `back quotes` mark code. */
function withCode(text) {
  return text.split("`").map((part, i) => i % 2 ? el("code", {}, part) : part);
}

// ---- Numbers ------------------------------------------------------------------------------------

function locale() {
  return language === "pt" ? "pt-BR" : "en";
}

/* At most so many digits after the point. */
function number(value, digits = 2) {
  return value.toLocaleString(locale(), { maximumFractionDigits: digits });
}

/* With a sign, for rewards: above 0 is better than what people write. */
function signed(value, digits = 2) {
  const options = { minimumFractionDigits: digits, maximumFractionDigits: digits,
    signDisplay: "always" };
  return value.toLocaleString(locale(), options).replace("-", "−");
}

function percent(value, digits = 0) {
  return value.toLocaleString(locale(), { style: "percent", minimumFractionDigits: digits,
    maximumFractionDigits: digits });
}

function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return t("seconds", { s: whole });
  return t("minutes", { m: Math.floor(whole / 60), s: whole % 60 });
}

function fileSize(bytes) {
  if (bytes < 1e5) return t("file.small", { bytes: number(bytes / 1000, 1) });
  return t("file.large", { bytes: number(bytes / 1e6, 1) });
}

/* A reward, in words for the eye and the ear: its sign and its colour say the same. */
function rewardMark(value) {
  return el("span", { class: value > 0 ? "reward up" : "reward down" }, signed(value));
}

// ---- Curves -------------------------------------------------------------------------------------

const FRAME = { width: 220, height: 104, left: 34, top: 8, bottom: 88 };

/* The path through points {x, y} whose places are shares of the frame. */
function curvePath(points, place) {
  return points.map((point, i) => (i ? "L" : "M") + place(point)).join("");
}

/* curveFigure -- curves over a stage's steps as a figure. The first is drawn solid, the second
 * dashed: colour is never the only difference.
 * in   curves: [{name, points: [{x, y}]}], total: the last step there will be; isWide: it has a
 *      whole card; level: a value that is drawn as a line, whatever the curve's are */
function curveFigure(curves, total, { isWide = false, level = null } = {}) {
  const width = isWide ? 2 * FRAME.width : FRAME.width;
  const right = width - 4;
  const drawn = curves.filter(({ points }) => points.length > 0);
  const values = drawn.flatMap(({ points }) => points.map(point => point.y));
  if (level !== null) values.push(level);
  const low = Math.min(...values);
  const high = Math.max(...values);
  const range = high - low || Math.abs(high) || 1;
  const x = value => FRAME.left + (right - FRAME.left) * value / Math.max(1, total);
  const y = value => FRAME.bottom - (FRAME.bottom - FRAME.top) * (value - low) / range;
  const place = point => `${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`;
  const spoken = drawn.map(({ name, points }) => t("curve.spoken", { name, count: points.length,
    first: number(points[0].y), last: number(points.at(-1).y) })).join(" ");

  const svg = el("svg", { viewBox: `0 0 ${width} ${FRAME.height}`, role: "img",
    preserveAspectRatio: "xMinYMid meet", "aria-label": spoken });
  const isBetween = level !== null && level > low && level < high;
  for (const value of high > low ? [low, high, ...isBetween ? [level] : []] : [low]) {
    svg.append(
      el("path", { class: "axis", d: `M${FRAME.left} ${y(value)}H${right}` }),
      el("text", { x: FRAME.left - 4, y: y(value) + 3, "text-anchor": "end" }, number(value, 1)));
  }
  svg.append(el("text", { x: right, y: FRAME.height - 3, "text-anchor": "end" },
    t("curve.steps", { steps: number(total, 0) })));
  drawn.forEach(({ points }, i) => {
    svg.append(el("path", { class: i ? "curve second" : "curve", d: curvePath(points, place) }));
    const last = points.at(-1);
    svg.append(el("circle", { class: "mark", cx: x(last.x), cy: y(last.y), r: 2.4 }));
  });
  const names = drawn.flatMap(({ name, points }, i) => [i ? "; " : "", i ? "┄ " : "— ", `${name} `,
    el("b", {}, number(points.at(-1).y))]);
  return el("figure", {}, el("figcaption", {}, ...names), svg);
}

// ---- The program --------------------------------------------------------------------------------

/* What all screens share. `engine` trains; `side` answers short questions meanwhile, with copies of
 * the files that it needs. */
const app = { engine: null, side: null, assets: null, lent: new Map() };

/* Gives the side engine a folder of the engine's, as far as it has changed. */
function lend(folder) {
  for (const [path, data] of app.engine.files) {
    const inside = path.startsWith(`${folder}/`);
    const isCheckpoint = path.slice(folder.length).includes("/checkpoint-");
    if (!inside || isCheckpoint || app.lent.get(path) === data) continue;
    app.side.write(path, data);
    app.lent.set(path, data);
  }
}

/* One short run beside a training. Throws what the program says if it fails. */
async function ask(args, folders = [], options = {}) {
  folders.forEach(lend);
  const result = await app.side.run(args, options);
  if (result.code !== 0) throw new Error(lastLine(result.stderr));
  return result.stdout;
}

/* The program's own word on what went wrong: the last line of its messages. */
function lastLine(text) {
  return text.trim().split("\n").at(-1).replace(/^align: /, "");
}

/* What is said of a run that failed. */
function failure(stderr) {
  const message = lastLine(stderr);
  const isMemory = /memory|broke off/.test(message);
  return t(isMemory ? "failed.memory" : "failed", { message });
}

function jsonLines(text) {
  return text.split("\n").filter(line => line.trim()).map(line => JSON.parse(line));
}

/* Calls `work` with the newest arguments, one call at a time: while a number is being dragged, what
 * lies between is left out. */
function latest(work) {
  let isBusy = false;
  let next = null;
  return async function call(...args) {
    next = args;
    if (isBusy) return;
    isBusy = true;
    while (next) {
      const now = next;
      next = null;
      await work(...now);
    }
    isBusy = false;
  };
}

/* Where the models of a run are, in the order of the course; `mine` is the reader's own. */
const MODELS = ["language_model", "ppo", "dpo", "mine"];

function hasModel(name) {
  return Boolean(app.engine && app.engine.read(`out/${name}/model.safetensors`));
}

function modelsThere() {
  return MODELS.filter(hasModel);
}

/* A slider with its number: both say and take the same value. */
function field({ name, label, about, low, high, step, value, test, changed }) {
  const id = `field-${test ?? name}`;
  const slider = el("input", { type: "range", min: low, max: high, step, value,
    "aria-label": label, tabindex: -1 });
  const box = el("input", { type: "number", id, step: "any", value, "data-test": test });
  slider.addEventListener("input", () => {
    box.value = slider.value;
    changed(Number(box.value));
  });
  box.addEventListener("input", () => {
    if (box.value === "" || !Number.isFinite(Number(box.value))) return;
    slider.value = box.value;
    changed(Number(box.value));
  });
  const described = about ? [el("span", { class: "about" }, about)] : [];
  return el("div", { class: "field" }, el("label", { for: id }, label), slider, box, ...described);
}
