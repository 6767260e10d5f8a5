"use strict";
/* taste.js -- the fourth screen: the reader compares answers, DPO learns from these pairs, and the
 * model before and after is shown side by side. */

const WANTED = 20; /* pairs that are asked for */
const LEAST = 6; /* from which on training is offered */
const SHOWN = 40; /* beginnings for the figures afterwards */

/* pairs: {prompt, chosen, rejected}; ready: pairs of answers to be compared next; place: which
 * beginnings have been used. */
const taste = { rule: "shorter", pairs: [], ready: [], now: null, place: 0, state: "idle", points: {}, result: null };

/* Beginnings of real sentences, three to five words, the same in every run. */
const beginnings = once(() => jsonLines(shipped("docs/reviews.jsonl"))
  .map(({ text }, i) => text.split(" ").slice(0, 3 + i % 3).join(" "))
  .filter((text, i) => i % 7 === 0 && /^[A-Z][\w' ,-]+$/.test(text)));

function nextBeginnings(count) {
  const list = beginnings();
  const taken = Array.from({ length: count }, (_, i) => list[(taste.place + i) % list.length]);
  taste.place += count;
  return taken;
}

/* Answers of a model to prompts, several each, as long as texts of the course. */
async function answersOf(model, prompts, each, seed) {
  app.side.write("prompts.jsonl", prompts.map(prompt => JSON.stringify({ prompt })).join("\n"));
  return jsonLines(await ask(["generate", "--model_name_or_path", `out/${model}`,
    "--dataset_name", "prompts.jsonl", "--do_sample", "--top_k", "0", "--temperature", "0.7",
    "--max_new_tokens", "40", "--num_return_sequences", String(each), "--seed", String(seed),
    "--json"], [`out/${model}`]));
}

const END = "<|endoftext|>";

// ---- Choosing -----------------------------------------------------------------------------------

/* The rules that are offered, each with what it looks at; for a rule of one's own, nothing. */
const RULES = {
  shorter: text => wordsOf(text),
  longer: text => wordsOf(text),
  comma: text => Number(text.includes(",")),
  mine: null,
};

/* Two different answers to a prompt, both with an end of their own where there are such: DPO learns
 * the end, too. Under a rule two between which it can decide, in the order in which they came. */
function twoOf({ prompt, texts }) {
  const ended = texts.filter(text => text.includes(END));
  const pool = [...new Set((ended.length >= 2 ? ended : texts).map(clean))]
    .filter(text => text.trim());
  const look = RULES[taste.rule];
  if (!look || pool.length < 2) return pool.length >= 2 ? { prompt, texts: pool.slice(0, 2) } : null;
  const sorted = [...pool].sort((a, b) => look(a) - look(b));
  const ends = [sorted[0], sorted.at(-1)];
  if (look(ends[0]) === look(ends[1])) return null;
  return { prompt, texts: pool.filter(text => ends.includes(text)) };
}

/* Pairs that were written for another rule may not show this one. */
function chooseRule(rule) {
  if (rule === taste.rule) return;
  const hadPairs = taste.pairs.length > 0;
  taste.rule = rule;
  startAfresh();
  if (hadPairs) byId("train-said").textContent = t("taste.other");
}

function startAfresh() {
  forgetTaste();
  drawTaste();
}

function drawRules() {
  byId("rules").replaceChildren(...Object.keys(RULES).map(rule => el("button", { type: "button",
    "aria-pressed": String(rule === taste.rule), click: () => chooseRule(rule) },
  t(`taste.rule.${rule}`))));
}

/* The pairs were answers of models that are gone. */
function forgetTaste() {
  Object.assign(taste, { pairs: [], ready: [], now: null, points: {}, result: null, state: "idle" });
  byId("train-said").textContent = "";
  byId("train-said").dataset.state = "idle";
}

/* The answers that are being written; who needs some waits for those. */
let writing = null;

function writeMore() {
  writing ??= writePairs().finally(() => writing = null);
  return writing;
}

async function writePairs() {
  try {
    const written = await answersOf("language_model", nextBeginnings(8), 4, 1 + taste.place);
    taste.ready.push(...written.map(twoOf).filter(pair => pair));
    taste.tries = taste.ready.length > 0 ? 0 : (taste.tries ?? 0) + 1;
  } catch (error) {
    byId("train-said").textContent = t("failed", { message: error.message });
  }
}

async function nextPair() {
  if (!hasModel("language_model")) return;
  if (taste.ready.length === 0) {
    taste.now = null;
    drawPair();
    // of eight beginnings none may have answers between which the rule decides
    do await writeMore(); while (taste.ready.length === 0 && taste.tries > 0 && taste.tries < 5);
    // chosen quickly, the pair that was waited for may have been taken already
    if (taste.now) return;
  }
  taste.now = taste.ready.shift() ?? null;
  drawPair();
  // the next ones are written while this pair is read
  if (taste.ready.length < 3) writeMore();
}

function choose(i) {
  if (!taste.now) return;
  const { prompt, texts } = taste.now;
  taste.pairs.push({ prompt, chosen: texts[i], rejected: texts[1 - i] });
  nextPair();
}

function undo() {
  const last = taste.pairs.pop();
  if (!last) return;
  if (taste.now) taste.ready.unshift(taste.now);
  taste.now = { prompt: last.prompt, texts: [last.chosen, last.rejected] };
  drawPair();
}

function drawPair() {
  const { now, pairs } = taste;
  byId("rate-prompt").textContent = now ? `${harmless(now.prompt)} …` : t("taste.writing");
  ["choose-1", "choose-2"].forEach((id, i) => {
    byId(id).disabled = !now;
    byId(id).replaceChildren(el("span", { class: "quiet" }, `${i + 1} `),
      el("span", { class: "text", lang: "en" }, now ? `…${harmless(now.texts[i])}` : ""));
  });
  byId("rate-count").textContent = pairs.length;
  byId("rate-said").textContent = t(pairs.length < WANTED ? "taste.count" : "taste.enough");
  byId("rate-undo").disabled = pairs.length === 0;
  byId("train").disabled = pairs.length < LEAST || app.engine.running;
}

/* 1 and 2 choose, n asks for two others, u takes back: not while one writes in a field. */
function rateKey(event) {
  const isElsewhere = byId("taste").hidden || event.target.matches("input, select, dialog *");
  if (isElsewhere || event.ctrlKey || event.metaKey || event.altKey) return;
  const actions = { 1: () => choose(0), 2: () => choose(1), n: nextPair, u: undo };
  actions[event.key]?.();
}

// ---- Training -----------------------------------------------------------------------------------

/* DPO as the course's fourth stage runs it, on these few pairs. The pairs are kept as a file that
 * TRL reads, too. */
async function trainTaste() {
  app.engine.write("out/my_preferences.jsonl",
    taste.pairs.map(pair => `${JSON.stringify(pair)}\n`).join(""));
  app.engine.remove("out/mine");
  app.lent.forEach((data, path) => path.startsWith("out/mine/") && app.lent.delete(path));
  taste.points = {};
  byId("changed").hidden = true;
  setTaste("running");
  const result = await app.engine.run(["dpo", "--model_name_or_path", "out/language_model",
    "--dataset_name", "out/my_preferences.jsonl", "--output_dir", "out/mine", "--max_steps", "40",
    "--per_device_train_batch_size", "8", "--learning_rate", "6e-4", "--warmup_steps", "5",
    "--beta", "0.1", "--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.2",
    "--temperature", "0.7", "--logging_steps", "1", "--save_steps", "0"],
  { progress: tasteSays });
  if (result.stopped) return setTaste("stopped");
  if (result.code !== 0) {
    setTaste("failed");
    byId("train-said").textContent = failure(result.stderr);
    return;
  }
  await compareTaste();
  setTaste("done", result.seconds);
}

function tasteSays(event) {
  if (event.kind !== "step") return;
  for (const metric of ["loss", "rewards/margins"]) {
    if (!Number.isFinite(event.metrics[metric])) continue;
    (taste.points[metric] ??= []).push({ x: event.step, y: event.metrics[metric] });
  }
  drawTasteCurves();
}

function drawTasteCurves() {
  byId("train-curves").replaceChildren(...Object.entries(taste.points).map(([metric, points]) =>
    curveFigure([{ name: t(metric === "loss" ? "curve.dpo_loss" : CURVES[metric]), points }], 40)));
}

function setTaste(state, seconds) {
  taste.state = state;
  taste.seconds = seconds ?? taste.seconds;
  const said = byId("train-said");
  said.dataset.state = state;
  const isRunning = state === "running";
  document.documentElement.dataset.engine = isRunning ? "running" : "ready";
  said.textContent = isRunning ? t("taste.running", { count: taste.pairs.length })
    : state === "done" ? t("taste.done", { time: duration(taste.seconds) }) : "";
  byId("train-stop").hidden = !isRunning;
  modelsChanged();
  drawPair();
}

// ---- What has changed ---------------------------------------------------------------------------

function wordsOf(text) {
  return text.trim().split(/\s+/).filter(word => /\w/.test(word)).length;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
}

/* Figures of answers: their length, the reward model's judgement, how many have an end. */
async function figuresOf(rows) {
  const rewards = hasModel("reward_model")
    ? await judge(rows.map(({ prompt, text }) => prompt + clean(text))) : [];
  return { words: mean(rows.map(({ text }) => wordsOf(clean(text)))),
    commas: mean(rows.map(({ text }) => RULES.comma(text))),
    better: course.judged ? mean(rewards.map(betterThan)) : null,
    ends: mean(rows.map(({ text }) => text.includes(END) ? 1 : 0)), rows };
}

async function compareTaste() {
  const prompts = nextBeginnings(SHOWN);
  const rowsOf = async model => (await answersOf(model, prompts, 1, 7))
    .map(({ prompt, texts }) => ({ prompt, text: texts[0] }));
  const side = name => taste.pairs.map(pair => ({ prompt: pair.prompt, text: pair[name] + END }));
  taste.result = {
    chosen: await figuresOf(side("chosen")),
    rejected: await figuresOf(side("rejected")),
    before: await figuresOf(await rowsOf("language_model")),
    after: await figuresOf(await rowsOf("mine")),
  };
  drawChanged();
}

function drawChanged() {
  const { result } = taste;
  byId("changed").hidden = !result;
  if (!result) return;
  const { before, after } = result;
  const count = taste.pairs.length;
  const isComma = taste.rule === "comma";
  // those that are shown, the emptiest first under a rule that asks for short answers
  const order = before.rows.map((row, i) => i);
  if (taste.rule === "shorter") {
    order.sort((a, b) => wordsOf(clean(after.rows[a].text)) - wordsOf(clean(after.rows[b].text)));
  }
  const isEmpty = taste.rule === "shorter" && wordsOf(clean(after.rows[order[0]].text)) < 3;
  byId("changed-said").replaceChildren(
    el("p", {}, el("b", {}, isComma
      ? t("taste.headline.comma", { count, before: percent(before.commas), after: percent(after.commas) })
      : t("taste.headline", { count, before: number(before.words, 1), after: number(after.words, 1) }))),
    ...isEmpty ? [el("p", {}, t("taste.hacked"))] : []);
  byId("changed-about").textContent = t("taste.changed.about", { count });
  const columns = ["chosen", "rejected", "before", "after"];
  const rows = [
    ["taste.words", name => number(result[name].words, 1)],
    ["taste.commas", name => percent(result[name].commas)],
    ["taste.reward", name => percent(result[name].better ?? 0)],
    ["taste.ends", name => name in { before: 1, after: 1 } ? percent(result[name].ends) : "–"],
  ].filter(([key]) => key !== "taste.reward" || before.better !== null);
  byId("changed-table").replaceChildren(
    el("thead", {}, el("tr", {}, el("td", {}), ...columns.map(name =>
      el("th", { scope: "col", class: "numbers" }, t(`taste.${name}`))))),
    el("tbody", {}, ...rows.map(([key, value]) => el("tr", {},
      el("th", { scope: "row" }, t(key)),
      ...columns.map(name => el("td", { class: "numbers" }, value(name)))))));
  byId("changed-samples").replaceChildren(...order.slice(0, 8).map((i, place) =>
    el("article", { class: isEmpty && place === 0 ? "card framed" : "card" },
      ...[["before", before.rows[i]], ["after", after.rows[i]]].map(([name, { text }]) =>
        el("p", {}, el("span", { class: "quiet" }, t(`taste.${name}`)), el("br"),
          whole(before.rows[i].prompt, text))))));
}

// ---- The screen ---------------------------------------------------------------------------------

function drawTaste() {
  drawRules();
  drawPair();
  drawTasteCurves();
  drawChanged();
  if (!byId("taste").hidden && !taste.now && hasModel("language_model")) nextPair();
  drawRead("taste-read", ["data collection", "direct preference optimization (DPO)",
    "beta parameter (β)", "reference model"],
  ["collect_preferences", "dpo_pair_loss", "dpo_loss"]);
}

function startTaste() {
  byId("choose-1").addEventListener("click", () => choose(0));
  byId("choose-2").addEventListener("click", () => choose(1));
  byId("rate-new").addEventListener("click", nextPair);
  byId("rate-undo").addEventListener("click", undo);
  byId("rate-fresh").addEventListener("click", startAfresh);
  byId("train").addEventListener("click", trainTaste);
  byId("train-stop").addEventListener("click", () => app.engine.stop());
  document.addEventListener("keydown", rateKey);
}
