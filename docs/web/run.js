"use strict";
/* run.js -- the first screen: the whole course, as it happens. `align rlhf` does the work; this file
 * reads what it says and draws it. */

/* The stages as align names them, the flag and the number of steps of each in the whole course, and
 * the seconds that they took in a browser on one core: a start, and a share for each step. They only
 * say how long a run will take before it has begun, on slow cores 2.4 times as long; then its own
 * pace counts. */
const STAGES = [
  { name: "1/4 language model", flag: "pretrain_steps", test: "pretrain-steps", steps: 3200,
    start: 3, cost: 0.048, curves: [["loss", "eval_loss"]] },
  { name: "2/4 reward model", flag: "reward_steps", test: "reward-steps", steps: 450,
    start: 6, cost: 0.17, curves: [["accuracy", "eval_accuracy"]] },
  { name: "3/4 ppo", flag: "ppo_steps", test: "ppo-steps", steps: 85,
    start: 3, cost: 0.65, curves: [["env/reward_mean"], ["objective/kl"]] },
  { name: "4/4 dpo", flag: "dpo_steps", test: "dpo-steps", steps: 150,
    start: 14, cost: 0.35, curves: [["rewards/margins"], ["eval_reward"]] },
];

const CURVES = {
  "loss": "curve.loss",
  "eval_loss": "curve.eval_loss",
  "accuracy": "curve.accuracy",
  "eval_accuracy": "curve.eval_accuracy",
  "env/reward_mean": "curve.reward",
  "objective/kl": "curve.kl",
  "rewards/margins": "curve.margins",
  "eval_reward": "curve.eval_reward",
};

/* The run: `state` is idle, running, paused, stopped, failed or done. Of each stage its state, the
 * step it is at, its curves by metric, and its samples. */
const course = { state: "idle", stages: [], gone: 0, data: null, judged: null, scale: null };

function freshStages() {
  return STAGES.map(() => ({ state: "waiting", step: 0, total: 0, left: null, points: {},
    samples: [] }));
}

// ---- Before the run -----------------------------------------------------------------------------

function stepsOf(i) {
  return Number(byId(`field-${STAGES[i].test}`).value);
}

function secondsOf(i, steps) {
  return STAGES[i].start + STAGES[i].cost * steps;
}

function expectedSeconds() {
  return STAGES.reduce((sum, stage, i) => sum + secondsOf(i, stepsOf(i)), 0);
}

/* The slider sets the steps of all stages, in tenths of the whole course. */
function chooseShare() {
  const share = Number(byId("share").value) / 10;
  STAGES.forEach(({ steps, test }, i) => {
    const box = byId(`field-${test}`);
    box.value = Math.round(steps * share);
    box.previousElementSibling.value = box.value;
  });
  sayShare();
}

function sayShare() {
  const [a, b, c, d] = STAGES.map((stage, i) => number(stepsOf(i), 0));
  const share = stepsOf(2) / STAGES[2].steps;
  const effect = share < 0.15 ? "small" : share < 0.95 ? "good" : "whole";
  const seconds = expectedSeconds();
  const time = duration(10 * Math.round(seconds / 10));
  const most = duration(10 * Math.round(2.4 * seconds / 10));
  byId("share-said").textContent =
    `${t(`run.length.${effect}`)} ${t("run.length.said", { time, most, a, b, c, d })}`;
}

function drawSteps() {
  const values = STAGES.map(({ test }) => byId(`field-${test}`)?.value);
  byId("steps").replaceChildren(...STAGES.map(({ test, steps }, i) => field({
    name: test, test, label: t(`run.steps.${i + 1}`), low: i === 1 ? 1 : 0, high: steps, step: 1,
    value: values[i] ?? Math.round(steps * Number(byId("share").value) / 10), changed: sayShare,
  })));
  sayShare();
}

async function takeTexts(event) {
  const [file] = event.target.files;
  if (!file) return;
  const text = await file.text();
  course.data = { name: file.name, text };
  const lines = text.split("\n").filter(line => line.trim()).length;
  byId("own-said").textContent = t("run.own.said", { name: file.name, lines: number(lines, 0) });
}

// ---- The run ------------------------------------------------------------------------------------

/* rlhf with a checkpoint in each tenth of a stage: a run that was stopped goes on from there by the
 * same command. */
function courseCommand() {
  const data = course.data ? "own.jsonl" : "docs/reviews.jsonl";
  const steps = STAGES.flatMap(({ flag }, i) => [`--${flag}`, String(stepsOf(i))]);
  return ["rlhf", "--dataset_name", data, ...steps, "--resume_from_checkpoint", "true"];
}

/* A new run replaces what is there: it asks first. */
function beginCourse() {
  const isReplacing = course.state !== "stopped" && modelsThere().length > 0;
  byId("replace").hidden = !isReplacing;
  if (isReplacing) byId("replace-not").focus();
  else runCourse();
}

async function runCourse() {
  const isContinued = course.state === "stopped";
  byId("replace").hidden = true;
  if (!isContinued) {
    app.engine.remove("out");
    app.lent.clear();
    Object.assign(course, { stages: freshStages(), gone: 0, judged: null, scale: null,
      isLoaded: false });
    byId("results").hidden = true;
    byId("keep-said").textContent = "";
    forgetTaste();
  }
  if (course.data) app.engine.write("own.jsonl", course.data.text);
  course.begun = performance.now() - 1000 * course.gone;
  setCourse("running");
  const result = await app.engine.run(courseCommand(),
    { live: true, progress: courseSays, file: courseWrote });
  course.gone = (performance.now() - course.begun) / 1000;
  if (result.stopped) return setCourse("stopped");
  if (result.code !== 0) {
    setCourse("failed");
    byId("run-said").textContent = failure(result.stderr);
    return;
  }
  for (const stage of course.stages) stage.state = "done";
  setCourse("done");
  showResults();
}

/* The state of the run, and what can be done in it. */
function setCourse(state) {
  course.state = state;
  const isBusy = state === "running" || state === "paused";
  const said = byId("run-said");
  said.dataset.state = state;
  document.documentElement.dataset.engine = isBusy ? "running" : "ready";
  const words = {
    idle: () => t("run.ready"),
    running: () => sayRunning(),
    paused: () => t("run.paused"),
    stopped: () => t("run.stopped"),
    failed: () => "",
    done: () => course.isLoaded ? t("run.loaded")
      : `${t("run.done", { time: duration(course.gone) })} ${t("run.leave")}`,
  };
  said.textContent = words[state]();
  byId("begin").hidden = isBusy;
  byId("begin").textContent = t(state === "stopped" ? "run.continue" : "run.begin");
  byId("stop").hidden = !isBusy;
  byId("pause").hidden = !isBusy || !app.engine.canPause;
  byId("pause").textContent = t(state === "paused" ? "run.resume" : "run.pause");
  byId("again").hidden = state !== "stopped";
  byId("see").hidden = state !== "done";
  // the run's own pace counts now
  byId("share-said").hidden = isBusy;
  byId("whole").hidden = state === "idle";
  for (const input of byId("start").querySelectorAll("input")) {
    input.disabled = isBusy || state === "stopped";
  }
  for (const stage of course.stages) {
    if (stage.state === "running" && !isBusy) stage.state = "stopped";
  }
  drawStages();
  drawWhole();
  modelsChanged();
}

function sayRunning() {
  const i = course.stages.findIndex(stage => stage.state === "running");
  return i < 0 ? t("run.preparing") : t("run.working", { stage: t(`stage.${i + 1}`) });
}

/* What the program says: a step, or a text that the model has just written. */
function courseSays(event) {
  const i = STAGES.findIndex(({ name }) => name === event.stage);
  if (event.kind === "step" && i >= 0) enterStep(i, event);
  if (event.kind === "sample") {
    const now = course.stages.findLast(stage => stage.state === "running");
    now?.samples.push({ prompt: event.prompt, text: clean(event.text), score: event.score });
  }
  drawSoon();
}

function enterStep(i, event) {
  const stage = course.stages[i];
  if (stage.state !== "running") {
    course.stages.slice(0, i).forEach(earlier => earlier.state = "done");
    stage.state = "running";
    byId("run-said").textContent = sayRunning();
    if (i >= 2) startJudge();
  }
  // an evaluation before the first step knows no total
  Object.assign(stage, { step: event.step, total: event.total || stepsOf(i), left: event.left });
  for (const [metric, y] of Object.entries(event.metrics)) {
    // before its first log entry a stage says 0 of what it has not measured yet
    const isUnmeasured = y === 0 && metric === "accuracy" && !stage.points[metric];
    if (metric in CURVES && Number.isFinite(y) && !isUnmeasured) addPoint(stage, metric, event.step, y);
  }
}

/* A run that goes on repeats the steps since its last checkpoint: they replace what was there. */
function addPoint(stage, metric, x, y) {
  const points = stage.points[metric] ??= [];
  while (points.length > 0 && points.at(-1).x >= x) points.pop();
  points.push({ x, y });
}

/* A log has what did not fit on the program's line: the evaluations. */
function readLog(i, path) {
  const log = JSON.parse(app.engine.text(path) ?? "null");
  if (!log) return;
  const stage = course.stages[i];
  for (const metric of Object.keys(CURVES).filter(name => name.startsWith("eval_"))) {
    const points = log.log_history.filter(entry => Number.isFinite(entry[metric]))
      .map(entry => ({ x: entry.step, y: entry[metric] }));
    if (points.length > 0) stage.points[metric] = points;
  }
  drawSoon();
}

/* The files of a checkpoint of DPO are there: what would this policy write? DPO itself samples
 * nothing while it learns. */
function courseWrote(path) {
  const folders = ["language_model", "reward_model", "ppo", "dpo"];
  const [, folder, name] = /^out\/(\w+)\/(checkpoint-\d+|trainer_state.json)$/.exec(path) ?? [];
  if (folder) {
    const log = name === "trainer_state.json" ? path : `${path}/trainer_state.json`;
    readLog(folders.indexOf(folder), log);
  }
  if (/^out\/dpo\/checkpoint-\d+$/.test(path)) sampleDpo(path);
  if (path === "out/reward_model/model.safetensors") startJudge();
  // the other screens can use a model as soon as it is there
  if (/^out\/(language_model|ppo|dpo)\/model.safetensors$/.test(path)) modelsChanged();
}

const sampleDpo = latest(async folder => {
  const files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"];
  try {
    for (const file of files) {
      const data = app.engine.read(`${folder}/${file}`);
      if (!data) return;
      app.side.write(`live/${file}`, data);
    }
    app.side.write("live.jsonl", DPO_PROMPTS.map(prompt => JSON.stringify({ prompt })).join("\n"));
    const written = jsonLines(await ask(["generate", "--model_name_or_path", "live",
      "--dataset_name", "live.jsonl", "--do_sample", "--top_k", "0", "--temperature", "0.7",
      "--max_new_tokens", "28", "--json"]));
    const rewards = await judge(written.map(({ prompt, texts }) => prompt + clean(texts[0])));
    written.forEach(({ prompt, texts }, i) => course.stages[3].samples.push({ prompt,
      text: clean(texts[0]), better: betterThan(rewards[i]) }));
    drawSoon();
  } catch (error) {
    // a look at what DPO does is not worth ending its run for; the run itself reports its errors
    console.info(error.message);
  }
});

const DPO_PROMPTS = ["The film is", "It's a"];

/* An answer without the end token. */
function clean(text) {
  return text.replaceAll("<|endoftext|>", "");
}

// ---- The judge ----------------------------------------------------------------------------------

/* Rewards of texts, by the reward model of this run. */
async function judge(texts) {
  app.side.write("judge.jsonl", texts.map(text => JSON.stringify({ text })).join("\n"));
  const lines = jsonLines(await ask(["score", "--model_name_or_path", "out/reward_model",
    "--dataset_name", "judge.jsonl"], ["out/reward_model"]));
  return lines.map(({ reward }) => reward);
}

/* Real sentences to compare with: 20 that people liked, 20 that they disliked, evenly from the data. */
function realSentences() {
  const rows = jsonLines(course.data?.text ?? shipped("docs/reviews.jsonl"))
    .filter(({ text, score }) => text && Number.isFinite(score));
  const pick = isWanted => {
    const list = rows.filter(isWanted);
    const stride = Math.max(1, Math.floor(list.length / 20));
    return list.filter((row, i) => i % stride === 0).slice(0, 20);
  };
  return [...pick(({ score }) => score >= 1), ...pick(({ score }) => score <= -1)];
}

let isJudgeStarting = false;

async function startJudge() {
  if (course.judged || isJudgeStarting || !app.engine.read("out/reward_model/model.safetensors")) {
    return;
  }
  isJudgeStarting = true;
  try {
    const real = realSentences();
    const rewards = await judge(real.map(({ text }) => text));
    course.judged = real.map(({ text, score }, i) => ({ text, score, reward: rewards[i] }));
    drawStages();
    await judgeTyped();
  } catch (error) {
    byId("judge-said").textContent = t("failed", { message: error.message });
  }
  isJudgeStarting = false;
}

/* A reward as `align score` gives it, on the scale of the run's results: as soon as these are there. */
function scaled(reward) {
  const { mean, std } = course.scale ?? {};
  return Number.isFinite(std) ? (reward - mean) / std : null;
}

/* The share of real sentences that have a lower reward. */
function betterThan(reward) {
  if (!course.judged) return null;
  return course.judged.filter(real => real.reward < reward).length / course.judged.length;
}

const judgeTyped = latest(async () => {
  const text = byId("judge-text").value.trim();
  if (!course.judged) return;
  if (!text) {
    byId("judge-said").textContent = t("judge.empty");
    byId("judge-dots").replaceChildren();
    return;
  }
  const [reward] = await judge([text]);
  byId("judge-said").textContent = t("judge.said", { share: percent(betterThan(reward)),
    count: course.judged.length });
  drawJudged(reward);
  course.tried = [{ text, share: betterThan(reward) },
    ...(course.tried ?? []).filter(one => one.text !== text)].slice(0, 8);
  byId("judge-tried").replaceChildren(...course.tried.map(one => el("li", {},
    el("b", { class: "numbers" }, percent(one.share)), " ",
    el("span", { class: "text", lang: "en" }, harmless(one.text)))));
});

/* All rewards on one line: filled dots above for liked, hollow ones below, a triangle for the typed
 * sentence. */
function drawJudged(typed) {
  const rewards = [...course.judged.map(({ reward }) => reward), typed];
  const low = Math.min(...rewards);
  const range = Math.max(...rewards) - low || 1;
  const x = reward => 10 + 300 * (reward - low) / range;
  const svg = el("svg", { viewBox: "0 0 320 54", "aria-hidden": "true" },
    el("path", { class: "axis", d: "M6 27H314" }));
  for (const { reward, score, text } of course.judged) {
    svg.append(el("circle", { class: score > 0 ? "dot liked" : "dot disliked", cx: x(reward),
      cy: score > 0 ? 19 : 35, r: 3.6 }, el("title", {}, text)));
  }
  svg.append(el("path", { class: "mark", d: `M${x(typed)} 27l-6 12h12z` }));
  byId("judge-dots").replaceChildren(svg);
}

// ---- Drawing ------------------------------------------------------------------------------------

let isDrawing = false;

/* At most one drawing a frame, whatever comes in between. */
function drawSoon() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    drawStages();
    drawWhole();
  });
}

/* The cards of the stages, with what never changes in them. */
function buildStages() {
  course.stages = course.stages.length ? course.stages : freshStages();
  byId("stages").replaceChildren(...STAGES.map((stage, i) => el("li",
    { class: "stage panel", id: `stage-${i + 1}`, "data-test": `stage-${i + 1}` },
    el("h2", {}, el("span", {}, t(`stage.${i + 1}`)), el("span", { class: "state" })),
    el("p", {}, t(`stage.${i + 1}.about`)),
    el("p", { class: "said quiet numbers" }),
    el("div", { class: stage.curves.length > 1 ? "curves double" : "curves" }),
    el("h3", {}, t(`stage.${i + 1}.samples`)),
    i === 1 ? buildJudge() : el("ol", { class: "samples", tabindex: 0, reversed: true,
      "aria-label": t(`stage.${i + 1}.samples`) }))));
  drawStages();
}

/* Sentences on which a judge of words, not of meaning, goes wrong. */
const TRIES = ["not a bad film", "not good", "wonderful wonderful wonderful", "I like bananas"];

function buildJudge() {
  const text = byId("judge-text")?.value ?? t("judge.try");
  const form = el("form", { class: "judge", submit: event => {
    event.preventDefault();
    judgeTyped();
  } },
  el("p", { class: "wide" }, el("label", { for: "judge-text" }, t("judge.label")),
    el("input", { id: "judge-text", "data-test": "judge-text", maxlength: 300, autocomplete: "off",
      value: text, lang: "en" })),
  el("p", { class: "buttons" }, el("button", { id: "judge-do", "data-test": "judge-do" },
    t("judge.do"))),
  el("p", { class: "buttons tries" }, ...TRIES.map(words =>
    el("button", { type: "button", lang: "en", click: () => {
      byId("judge-text").value = words;
      judgeTyped();
    } }, words))),
  el("p", { id: "judge-said", role: "status", "data-test": "judge-said" }, t("judge.wait")),
  el("div", { id: "judge-dots" }),
  el("ul", { id: "judge-tried", class: "tried" }),
  el("p", { id: "judge-legend", class: "quiet", hidden: true }, t("judge.legend")));
  return form;
}

function drawStages() {
  course.stages.forEach((stage, i) => {
    const card = byId(`stage-${i + 1}`);
    card.dataset.state = stage.state;
    card.querySelector(".state").textContent = t(`stage.${stage.state}`);
    card.querySelector(".said").textContent = stageSaid(stage);
    drawCurves(card.querySelector(".curves"), stage, STAGES[i].curves);
    const list = card.querySelector(".samples");
    if (list) drawSamples(list, stage);
  });
  const isReady = Boolean(course.judged);
  for (const button of byId("judge-do").form.querySelectorAll("button")) button.disabled = !isReady;
  byId("judge-legend").hidden = !isReady;
}

function stageSaid({ state, step, total, left }) {
  if (state === "waiting") return "";
  const values = { step: number(step, 0), total: number(total, 0) };
  if (state === "running" && step === total) return t("stage.measuring", values);
  if (state !== "running" || left === null) return t("stage.step", values);
  return t("stage.left", { ...values, left: duration(left) });
}

function drawCurves(place, stage, groups) {
  const figures = groups
    .map(metrics => metrics.filter(metric => stage.points[metric]?.length > 0)
      .map(metric => ({ name: t(CURVES[metric]), points: stage.points[metric] })))
    .filter(curves => curves.length > 0)
    .map(curves => curveFigure(curves, stage.total,
      { isWide: groups.length === 1, level: groups[0][0] === "accuracy" ? 0.5 : null }));
  place.replaceChildren(...figures.length > 0 ? figures
    : [el("p", { class: "quiet" }, t("curve.waiting"))]);
}

/* The newest first; those that are there already stay, and with them the reader's place. */
function drawSamples(list, { samples, state }) {
  const shownAs = `${samples.length} ${state === "done"}`;
  if (list.dataset.shown === shownAs && list.childElementCount > 0) return;
  list.dataset.shown = shownAs;
  list.replaceChildren(...samples.length > 0 ? samples.map(drawSample).reverse()
    : [el("li", { class: "quiet" }, t(state === "done" ? "stage.unseen" : "stage.nothing"))]);
}

function drawSample({ prompt, text, score, better }) {
  const line = el("span", { class: "text", lang: "en" },
    el("span", { class: "given" }, harmless(prompt)), harmless(text));
  if (Number.isFinite(score) && score !== null) return el("li", {}, rewardMark(score), " ", line);
  if (!Number.isFinite(better) || better === null) return el("li", {}, line);
  return el("li", {}, line, " ",
    el("span", { class: "quiet" }, `(${t("stage.better", { share: percent(better) })})`));
}

/* How much of the expected time each stage has behind it; the run's own pace stretches the rest. */
function drawWhole() {
  const shares = course.stages.map(({ state, step, total }) =>
    state === "done" ? 1 : state === "waiting" ? 0 : step / Math.max(1, total));
  const seconds = STAGES.map((stage, i) => secondsOf(i, stepsOf(i)));
  const all = seconds.reduce((sum, value) => sum + value, 0);
  const done = seconds.reduce((sum, value, i) => sum + value * shares[i], 0);
  const bar = byId("whole-bar");
  bar.value = course.state === "done" ? 1 : Math.min(0.99, done / all);
  const isRunning = course.state === "running";
  const gone = isRunning ? (performance.now() - course.begun) / 1000 : course.gone;
  const values = { gone: duration(gone), memory: number(filesSize() / 1e6, 0) };
  const isKnown = isRunning && done > 0.04 * all;
  byId("whole-said").textContent = isKnown
    ? t("run.left", { ...values, time: duration((all - done) * gone / done) })
    : t("run.left.unknown", values);
  sayNeeds(isRunning, done / all);
}

/* On screens that need a model: that there is none, or that one is being trained. */
function sayNeeds(isRunning, share) {
  const i = course.stages.findIndex(stage => stage.state === "running");
  const text = isRunning && i >= 0
    ? t("needs.running", { stage: t(`stage.${i + 1}`), share: percent(share) }) : t("needs.model");
  for (const place of document.querySelectorAll(".needs")) place.textContent = text;
}

function filesSize() {
  let sum = 0;
  for (const data of app.engine?.files.values() ?? []) sum += data.length;
  return sum;
}

// ---- Results ------------------------------------------------------------------------------------

/* From the files of a run that is complete: this one's, or one that was loaded. */
function showResults() {
  const summary = JSON.parse(app.engine.text("out/summary.json") ?? "null");
  const report = JSON.parse(app.engine.text("out/report.json") ?? "null");
  byId("results").hidden = !summary || !report;
  if (!summary || !report) return;
  course.scale = summary.reward_model;
  byId("results-verdict").replaceChildren(...["ppo", "dpo"].map(name =>
    el("p", {}, ...verdict(name, summary))));
  byId("results-hills").replaceChildren(drawHills(report));
  byId("results-table").replaceChildren(...resultRows(summary));
  const disliked = [...report.samples].sort((a, b) => a.before.reward - b.before.reward);
  byId("results-samples").replaceChildren(...disliked.slice(0, 4).map(drawCompared));
  showReport();
  startJudge();
}

/* What a policy has gained, and what it has lost by it, in sentences. */
function verdict(name, { before, [name]: after }) {
  const gain = after.reward_after - after.reward_before;
  const values = { model: name.toUpperCase(), before: signed(after.reward_before),
    after: signed(after.reward_after), kl: number(after.kl, 1) };
  const said = [t(gain > 0.3 ? "results.verdict" : "results.verdict.not", values)];
  const isAlike = after.distinct_2 < 0.85 * before.distinct_2;
  said.push(t(isAlike ? "results.hacked" : "results.kept",
    { a: number(after.distinct_2), b: number(before.distinct_2) }));
  const longer = after.mean_length / before.mean_length;
  const lengths = { a: number(after.mean_length, 0), b: number(before.mean_length, 0) };
  if (longer > 1.25) said.push(t("results.longer", lengths));
  if (longer < 0.8) said.push(t("results.shorter", lengths));
  return [el("b", {}, said[0]), ` ${said.slice(1).join(" ")}`];
}

/* drawHills -- how many answers have which reward, a hill for each model, all on one scale. */
function drawHills(report) {
  const rows = [["real", [...report.liked, ...report.disliked].map(scaled)],
    ["before", report.before], ["ppo", report.ppo], ["dpo", report.dpo]]
    .filter(([, rewards]) => rewards?.length > 0 && rewards.every(Number.isFinite));
  const [low, high, bins, height] = [-3.5, 4, 30, 34];
  const x = reward => 92 + 300 * (reward - low) / (high - low);
  const svg = el("svg", { viewBox: `0 0 400 ${rows.length * 40 + 18}`, role: "img",
    "aria-label": t("results.hills") });
  rows.forEach(([name, rewards], row) => {
    const bottom = row * 40 + 38;
    const count = new Array(bins).fill(0);
    for (const reward of rewards) {
      const bin = Math.floor(bins * (reward - low) / (high - low));
      count[Math.max(0, Math.min(bins - 1, bin))]++;
    }
    // three neighbours to a mean, so that chance does not look like a peak
    const soft = count.map((n, i) => (n + (count[i - 1] ?? 0) + (count[i + 1] ?? 0)) / 3);
    const most = Math.max(...soft);
    const tops = soft.map((n, i) => {
      const at = low + (i + 0.5) * (high - low) / bins;
      return `L${x(at).toFixed(1)} ${(bottom - height * n / most).toFixed(1)}`;
    });
    svg.append(
      el("path", { class: name === "real" ? "hill real" : "hill",
        d: `M${x(low)} ${bottom}${tops.join("")}L${x(high)} ${bottom}z` }),
      el("text", { x: 86, y: bottom - 8, "text-anchor": "end" }, t(`results.${name}`)));
  });
  const end = rows.length * 40 + 12;
  for (const value of [-3, -2, -1, 0, 1, 2, 3]) {
    svg.append(el("text", { x: x(value), y: end, "text-anchor": "middle" }, number(value, 0)));
  }
  svg.append(el("path", { class: "axis", d: `M${x(0)} 2V${rows.length * 40}` }));
  return svg;
}

function resultRows(summary) {
  const head = ["model", "reward", "kl", "distinct", "length"].map((name, i) =>
    el("th", { scope: "col", class: i ? "numbers" : "" }, t(`results.${name}`)));
  const before = { ...summary.before, reward_after: summary.ppo.reward_before, kl: 0 };
  const rows = [["before", before], ["ppo", summary.ppo], ["dpo", summary.dpo]];
  return [
    el("thead", {}, el("tr", {}, ...head)),
    el("tbody", {}, ...rows.map(([name, result]) => el("tr", {},
      el("th", { scope: "row" }, t(`results.${name}`)),
      el("td", { class: "numbers", "data-test": `reward-${name}`, "data-value":
        result.reward_after }, rewardMark(result.reward_after)),
      el("td", { class: "numbers" }, number(result.kl, 1)),
      el("td", { class: "numbers" }, number(result.distinct_2)),
      el("td", { class: "numbers" }, number(result.mean_length, 1))))),
    el("caption", { class: "quiet" }, t("results.key")),
  ];
}

function drawCompared({ prompt, ...answers }) {
  const lines = ["before", "ppo", "dpo"].filter(name => answers[name]).map(name =>
    el("p", {}, el("span", { class: "quiet" }, `${t(`results.${name}`)} `),
      rewardMark(answers[name].reward), el("br"),
      whole(prompt, answers[name].tokens.join(""))));
  return el("article", { class: "card" }, ...lines);
}

/* A beginning, in grey, and its answer; "…" where the answer was cut off. */
function whole(prompt, text) {
  const end = text.includes("<|endoftext|>") ? "" : " …";
  return el("span", { class: "text", lang: "en" },
    el("span", { class: "given" }, harmless(prompt)), harmless(clean(text)) + end);
}

let reportAddress = null;

function showReport() {
  const page = app.engine.read("out/report.html");
  if (!page) return byId("report").replaceChildren();
  if (reportAddress) URL.revokeObjectURL(reportAddress);
  reportAddress = URL.createObjectURL(new Blob([page], { type: "text/html" }));
  byId("report-link").href = reportAddress;
  byId("report").replaceChildren(el("iframe", { src: reportAddress, title: t("report.title"),
    "data-test": "report" }));
}

// ---- The screen ---------------------------------------------------------------------------------

function drawRun() {
  drawSteps();
  buildStages();
  setCourse(course.state);
  if (course.state === "done" || app.engine?.read("out/summary.json")) showResults();
  if (course.judged) judgeTyped();
  drawRead("run-read", ["reinforcement learning from human feedback (RLHF)", "language model",
    "reward function", "proximal policy optimization (PPO)",
    "direct preference optimization (DPO)"],
  ["course_run", "language_loss", "reward_loss", "ppo_step", "dpo_pair_loss"]);
}

function pauseCourse() {
  if (course.state === "paused") {
    course.begun = performance.now() - 1000 * course.gone;
    app.engine.resume();
    return setCourse("running");
  }
  course.gone = (performance.now() - course.begun) / 1000;
  app.engine.pause();
  setCourse("paused");
}

function startRun() {
  byId("share").addEventListener("input", chooseShare);
  byId("own-texts").addEventListener("change", takeTexts);
  byId("begin").addEventListener("click", beginCourse);
  byId("replace-do").addEventListener("click", runCourse);
  byId("replace-not").addEventListener("click", () => byId("replace").hidden = true);
  byId("see").addEventListener("click", () => {
    byId("results-title").scrollIntoView();
    byId("results-title").focus({ preventScroll: true });
  });
  byId("pause").addEventListener("click", pauseCourse);
  byId("stop").addEventListener("click", () => app.engine.stop());
  byId("again").addEventListener("click", () => {
    course.stages = freshStages();
    course.gone = 0;
    setCourse("idle");
  });
  document.addEventListener("visibilitychange", () => {
    const isRunning = course.state === "running";
    if (document.hidden && isRunning) byId("background-note").hidden = false;
  });
  window.addEventListener("beforeunload", event => {
    if (course.state === "running" || course.state === "paused") event.preventDefault();
  });
  // the clock goes on between two messages of the program
  setInterval(() => course.state === "running" && drawWhole(), 1000);
}
