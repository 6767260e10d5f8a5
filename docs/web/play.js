"use strict";
/* play.js -- the third screen: the distribution of the next token, what each setting does to it, and
 * answers of all models under the same settings. `align next` and `align generate` compute both. */

/* The settings, with the flags' names, and which of the two commands take them. */
const SETTINGS = [
  { name: "temperature", low: 0.1, high: 2, step: 0.05, value: 0.7, next: true },
  { name: "top_k", low: 0, high: 50, step: 1, value: 0, next: true },
  { name: "top_p", low: 0.05, high: 1, step: 0.05, value: 1, next: true },
  { name: "repetition_penalty", key: "penalty", low: 1, high: 2, step: 0.05, value: 1, next: true },
  { name: "num_beams", key: "beams", low: 1, high: 8, step: 1, value: 1 },
  { name: "max_new_tokens", key: "length", low: 1, high: 40, step: 1, value: 24 },
  { name: "seed", low: 0, high: 99, step: 1, value: 42 },
];
const SHOWN_TOKENS = 12;

const play = { values: Object.fromEntries(SETTINGS.map(({ name, value }) => [name, value])) };

function drawSettings() {
  const draw = setting => {
    const key = setting.key ?? setting.name;
    return field({ ...setting, value: play.values[setting.name], test: `play-${setting.name}`,
      label: t(`play.${key}`), about: t(`play.${key}.about`),
      changed: value => {
        play.values[setting.name] = value;
        staleAnswers();
        if (setting.next) showNext();
      } });
  };
  byId("play-settings").replaceChildren(...SETTINGS.filter(({ next }) => next).map(draw));
  byId("write-settings").replaceChildren(...SETTINGS.filter(({ next }) => !next).map(draw));
}

function resetSettings() {
  for (const { name, value } of SETTINGS) play.values[name] = value;
  staleAnswers();
  drawSettings();
  showNext();
}

/* Answers that other settings have written are no longer the newest word. */
function staleAnswers() {
  byId("written-stale").hidden = byId("written").childElementCount === 0;
}

/* Division by 0 is no temperature: near it only the likeliest token is left. */
function flagOf(name) {
  return String(name === "temperature" ? Math.max(0.01, play.values[name]) : play.values[name]);
}

function promptOf() {
  return byId("prompt").value || " ";
}

// ---- The next token -----------------------------------------------------------------------------

/* GPT-2's vocabularies write each byte as a character of its own: printable ones as they are, the
 * others from U+0100 on. */
const byteOf = once(() => {
  const isPlain = byte => byte >= 33 && byte <= 126 || byte >= 161 && byte <= 172 || byte >= 174;
  const table = new Map();
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    table.set(String.fromCharCode(isPlain(byte) ? byte : next++), byte);
  }
  return table;
});

/* The tokens of a model's vocabulary as text, by id. */
function vocabulary(model) {
  const entries = Object.entries(JSON.parse(app.engine.text(`out/${model}/vocab.json`)));
  const decoder = new TextDecoder();
  const words = [];
  for (const [word, id] of entries) {
    const bytes = [...word].map(letter => byteOf().get(letter));
    words[id] = bytes.includes(undefined) ? word : decoder.decode(Uint8Array.from(bytes));
  }
  return words;
}

/* The distribution as it is, and what is left of it by top-k and top-p. */
const showNext = latest(async () => {
  const model = byId("play-model").value;
  if (!model || !hasModel(model)) return;
  const shape = (name, count) => ["next", "--model_name_or_path", `out/${name}`, "--prompt",
    promptOf(), "--json", "--top_n", String(count), "--temperature", flagOf("temperature"),
    "--repetition_penalty", flagOf("repetition_penalty")];
  const cuts = ["--top_k", flagOf("top_k"), "--top_p", flagOf("top_p")];
  try {
    const all = JSON.parse(await ask(shape(model, SHOWN_TOKENS), [`out/${model}`]));
    const cut = JSON.parse(await ask([...shape(model, SHOWN_TOKENS), ...cuts]));
    const was = await wordsBefore(model, shape);
    byId("play-sentence").textContent = `${harmless(promptOf())} …`;
    if (play.model !== model || play.size !== app.engine.read(`out/${model}/vocab.json`)) {
      Object.assign(play, { model, size: app.engine.read(`out/${model}/vocab.json`),
        words: vocabulary(model) });
    }
    byId("next-said").textContent = t("play.next.said", { kept: number(cut.kept, 0),
      all: number(all.kept, 0), largest: percent(all.top[0][1], 1) });
    const after = new Map(cut.top);
    byId("next-bars").replaceChildren(...all.top.map(([id, before]) =>
      drawBar({ word: play.words[id], before, after: after.get(id), was: was?.get(id),
        largest: all.top[0][1], isFiltered: cut.kept < all.kept })));
  } catch (error) {
    byId("next-said").textContent = t("failed", { message: error.message });
  }
});

/* What the model before said of each token, by id, to compare with; null where that is the model. */
async function wordsBefore(model, shape) {
  if (model === "language_model" || !hasModel("language_model")) return null;
  const { top } = JSON.parse(await ask(shape("language_model", 1000), ["out/language_model"]));
  return new Map(top);
}

/* A token's bar. What a filter has cut says so; what is left says what it has become. Below it, thin,
 * what the model before said. */
function drawBar({ word, before, after, was, largest, isFiltered }) {
  const isCut = after === undefined;
  const digits = value => percent(value, 1);
  const value = isCut ? `${digits(before)} ${t("play.cut")}`
    : isFiltered ? t("play.share", { before: digits(before), after: digits(after) })
      : digits(before);
  const width = share => `width:${Math.min(100, 100 * share / largest).toFixed(1)}%`;
  const compared = was === undefined ? [] : [el("span", { class: "was", style: width(was) })];
  const said = was === undefined ? value : `${value} (${t("play.was", { was: digits(was) })})`;
  return el("button", { type: "button", class: isCut ? "bar cut" : "bar", click: () => {
    byId("prompt").value += clean(word);
    showNext();
  } },
  el("span", { class: "token" }, harmless(JSON.stringify(word))),
  el("span", { class: "track" }, el("span", { class: "fill", style: width(before) }), ...compared),
  el("span", { class: "value" }, said));
}

// ---- Whole answers ------------------------------------------------------------------------------

/* The flags of generate. Beams look for the most probable answer, so nothing is drawn there. */
function generateFlags() {
  const { num_beams: beams } = play.values;
  const names = ["repetition_penalty", "num_beams", "max_new_tokens", "seed"];
  const sampling = ["temperature", "top_k", "top_p"];
  const used = beams > 1 ? names : [...names, ...sampling];
  const flags = used.flatMap(name => [`--${name}`, flagOf(name)]);
  return beams > 1 ? [...flags, "--no_repeat_ngram_size", "2"]
    : [...flags, "--do_sample", "--num_return_sequences", "3"];
}

async function writeAnswers() {
  const button = byId("write");
  button.disabled = true;
  try {
    const cards = [];
    for (const model of modelsThere()) cards.push(await writeWith(model));
    byId("written").replaceChildren(...cards);
    byId("written-stale").hidden = true;
  } catch (error) {
    byId("written").replaceChildren(el("p", { class: "warning" },
      t("failed", { message: error.message })));
  }
  button.disabled = false;
}

async function writeWith(model) {
  const prompt = promptOf();
  const [{ texts }] = jsonLines(await ask(["generate", "--model_name_or_path", `out/${model}`,
    "--prompt", prompt, "--json", ...generateFlags()], [`out/${model}`]));
  const isJudged = hasModel("reward_model");
  const rewards = isJudged ? await judge(texts.map(text => prompt + clean(text))) : [];
  const lines = texts.map((text, i) => el("p", {},
    ...isJudged ? [el("span", { class: "quiet" }, judgement(rewards[i])), el("br")] : [],
    whole(prompt, text)));
  return el("article", { class: "card" }, el("h3", {}, t(`model.${model}`)), ...lines);
}

/* A reward in words: on the results' scale if that is known, and beside real sentences. */
function judgement(reward) {
  const parts = [];
  if (scaled(reward) !== null) parts.push(t("play.judged", { reward: signed(scaled(reward)) }));
  if (course.judged) parts.push(t("play.better", { share: percent(betterThan(reward)) }));
  return parts.join(", ");
}

// ---- The screen ---------------------------------------------------------------------------------

function drawPlay() {
  drawSettings();
  const chosen = byId("play-model").value;
  const there = modelsThere();
  byId("play-model").replaceChildren(...there.map(name =>
    el("option", { value: name, selected: name === (there.includes(chosen) ? chosen : "ppo") },
      t(`model.${name}`))));
  if (!byId("play").hidden) showNext();
  drawRead("play-read", ["distribution", "temperature (τ)", "top-k sampling", "top-p sampling",
    "repetition penalty", "beam search"],
  ["process_logits", "top_p_cut", "sample_token", "beam_search"]);
}

function startPlay() {
  byId("play-form").addEventListener("submit", event => event.preventDefault());
  byId("prompt").addEventListener("input", () => showNext());
  byId("play-model").addEventListener("change", () => showNext());
  byId("write").addEventListener("click", writeAnswers);
  byId("play-reset").addEventListener("click", resetSettings);
}
