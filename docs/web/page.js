"use strict";
/* page.js -- language, the way through the screens, and the start of the program. */

const SCREENS = ["run", "play", "taste", "numbers", "keep"];
const DRAW = { run: drawRun, numbers: drawNumbers, play: drawPlay, taste: drawTaste,
  keep: drawKeep };

/* The texts of the page's skeleton, in the reader's language. */
function drawTexts() {
  document.documentElement.lang = language === "pt" ? "pt-BR" : "en";
  document.title = t("title");
  for (const place of document.querySelectorAll("[data-t]")) place.textContent = t(place.dataset.t);
  for (const place of document.querySelectorAll("[data-t-label]")) {
    place.setAttribute("aria-label", t(place.dataset.tLabel));
  }
}

function screenNow() {
  const name = location.hash.slice(1);
  return SCREENS.includes(name) ? name : "run";
}

/* The head's links, and the two at the foot of a screen. */
function drawNavigation() {
  const now = screenNow();
  byId("screens").replaceChildren(el("ol", {}, ...SCREENS.map(name => el("li", {},
    el("a", { href: `#${name}`, "data-test": `screen-${name}`,
      "aria-current": name === now ? "page" : undefined }, t(`screen.${name}`))))));
  // on a phone the links are wider than the screen
  const links = byId("screens").firstChild;
  const current = links.querySelector("[aria-current]");
  links.scrollLeft = current.offsetLeft - links.offsetLeft - 40;
  const at = SCREENS.indexOf(now);
  for (const [id, key, name] of [["back", "screen.back", SCREENS[at - 1]],
    ["onward", "screen.onward", SCREENS[at + 1]]]) {
    byId(id).hidden = !name;
    if (!name) continue;
    byId(id).href = `#${name}`;
    byId(id).textContent = t(key, { name: t(`screen.${name}`) });
  }
}

/* Shows a screen and moves the focus to its heading, as a new page would. */
function enterScreen() {
  const now = screenNow();
  for (const name of SCREENS) byId(name).hidden = name !== now;
  drawNavigation();
  scrollTo(0, 0);
  byId(`${now}-title`).focus({ preventScroll: true });
  if (app.engine && now !== "run" && now !== "numbers") DRAW[now]();
}

/* After a run or a load: what depends on models is there, or says that it needs one. */
function modelsChanged() {
  const isReady = hasModel("language_model");
  for (const place of document.querySelectorAll(".needs")) place.hidden = isReady;
  for (const place of document.querySelectorAll(".ready")) place.hidden = !isReady;
  for (const name of ["play", "taste", "keep"]) DRAW[name]();
  byId("load").disabled = app.engine.running;
  byId("machine").textContent = t("machine", { memory: number(app.engine.memory / 1e6, 0),
    files: number(filesSize() / 1e6, 0) });
}

function speak(code) {
  language = code;
  byId("language").value = code;
  drawTexts();
  drawNavigation();
  if (app.engine) for (const draw of Object.values(DRAW)) draw();
}

/* What keeps the program from running is said, in place of buttons that would do nothing. */
function giveUp(message) {
  byId("trouble").textContent = message;
  byId("trouble").hidden = false;
  byId("start").hidden = true;
}

async function start() {
  const wanted = navigator.languages?.[0] ?? "en";
  language = wanted.startsWith("pt") ? "pt" : "en";
  byId("language").value = language;
  document.documentElement.dataset.engine = "starting";
  drawTexts();
  enterScreen();
  byId("language").addEventListener("change", event => speak(event.target.value));
  addEventListener("hashchange", enterScreen);
  const lack = Engine.lacks();
  if (lack) {
    document.documentElement.dataset.engine = "lacks";
    return giveUp(t(`lacks.${lack}`));
  }
  byId("run-said").textContent = t("run.preparing");
  try {
    app.assets = await Engine.assets();
    app.side = await Engine.start(app.assets);
    app.engine = await Engine.start(app.assets);
  } catch (error) {
    return giveUp(t("failed.start", { message: error.message }));
  }
  window.engine = app.engine;
  startBook();
  startRun();
  startNumbers();
  startPlay();
  startTaste();
  startKeep();
  for (const draw of Object.values(DRAW)) draw();
  byId("begin").disabled = false;
  document.documentElement.dataset.engine = "ready";
}

start();
