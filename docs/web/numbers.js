"use strict";
/* numbers.js -- the second screen: one example of each idea, number by number. `align explain`
 * computes everything: the page changes the example's file, runs the program, and shows what it
 * prints. */

/* The topics in the order of the course. What can be changed: `fields` (single numbers), `table`
 * (lists, a number for each token), the same of each of `answers`; `sides` are the two answers of
 * DPO. `models`: which flags for real models a topic takes. */
const TOPICS = {
  bpe: { prompt: " wonderful", terms: ["tokenization of a data set"] },
  softmax: { fields: ["temperature"], table: ["logits"], models: ["model"],
    terms: ["softmax function", "logit", "distribution"] },
  sampling: { fields: ["temperature", "repetition_penalty", "top_k", "top_p", "u"],
    table: ["logits"], models: ["model"],
    terms: ["sampling", "temperature (τ)", "top-k sampling", "top-p sampling"] },
  beam: { terms: ["beam search"] },
  omega: { terms: ["omega function (ω)", "log-probability"] },
  kl: { table: ["p_logits", "q_logits"], models: ["model", "ref"],
    terms: ["Kullback-Leibler divergence (KL)", "reference model"] },
  reward: { fields: ["chosen", "rejected", "margin", "center_rewards_coefficient"],
    terms: ["Bradley-Terry model", "reward function", "sigmoid function"] },
  reinforce: { fields: ["baseline", "beta"],
    answers: { fields: ["score"], table: ["logps", "ref_logps"] }, models: ["model", "ref", "reward"],
    terms: ["policy gradient", "baseline", "log-derivative trick"] },
  gae: { fields: ["gamma", "lam"], answers: { table: ["rewards", "values"] },
    models: ["model", "ref", "reward"],
    terms: ["generalized advantage estimation (GAE)", "advantage", "value function"] },
  ppo: { fields: ["kl_coef", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef"],
    answers: { fields: ["score"],
      table: ["logprobs", "ref_logprobs", "values", "new_logprobs", "new_values"] },
    models: ["model", "ref", "reward"],
    terms: ["proximal policy optimization (PPO)", "probability ratio and clipping", "rollout"] },
  grpo: {
    fields: ["epsilon", "epsilon_high", "beta", "use_bias_correction_kl", "scale_rewards",
      "loss_type", "max_completion_length"],
    answers: { fields: ["score"], table: ["logprobs", "ref_logprobs", "new_logprobs"] },
    models: ["model", "ref", "reward"],
    terms: ["group relative policy optimization (GRPO)", "probability ratio and clipping",
      "Kullback-Leibler divergence (KL)"] },
  dpo: { fields: ["beta", "label_smoothing"], sides: ["chosen", "rejected"], models: ["model", "ref"],
    terms: ["direct preference optimization (DPO)", "beta parameter (β)"] },
  exact: { fields: ["beta"], table: ["ref_probabilities", "rewards"],
    terms: ["closed-form solution", "partition function", "objective function"] },
  attention: { models: ["model"], terms: ["language model"] },
  backprop: { terms: ["stochastic gradient ascent (SGA)", "loss function"] },
  lora: { terms: ["low-rank adaptation (LoRA)"] },
  adamw: { terms: ["optimization"] },
};

/* Those that the course's way needs, in its order. */
const COURSE_TOPICS = ["softmax", "reward", "reinforce", "kl", "gae", "ppo", "dpo"];

/* The range of a slider; the box beside it takes any number that the program takes. */
const RANGES = {
  temperature: [0.1, 3, 0.05],
  repetition_penalty: [1, 2, 0.05],
  top_k: [0, 4, 1],
  top_p: [0, 1, 0.05],
  u: [0, 0.99, 0.01],
  chosen: [-3, 3, 0.1],
  rejected: [-3, 3, 0.1],
  margin: [0, 3, 0.1],
  center_rewards_coefficient: [0, 1, 0.05],
  beta: [0.05, 2, 0.05],
  gamma: [0, 1, 0.05],
  lam: [0, 1, 0.05],
  kl_coef: [0, 1, 0.05],
  cliprange: [0, 0.9, 0.05],
  cliprange_value: [0, 0.9, 0.05],
  vf_coef: [0, 1, 0.05],
  score: [-3, 3, 0.1],
  label_smoothing: [0, 0.5, 0.05],
  epsilon: [0, 0.9, 0.05],
  epsilon_high: [0, 0.9, 0.05],
  use_bias_correction_kl: [0, 1, 1],
  max_completion_length: [4, 16, 1],
};

/* Fields whose value is one of a few words. */
const CHOICES = {
  baseline: ["rloo", "mean", "none"],
  scale_rewards: ["group", "batch", "none"],
  loss_type: ["grpo", "bnpo", "dr_grpo", "dapo"],
};

/* What is shown: the topic, the example as it stands, the text that was printed last, the prediction
 * that is asked, and those that are answered or skipped. */
const shown = { topic: "softmax", example: null, base: null, text: "", names: new Map(), asked: 0 };

/* A place in an example: "answers.0.score". */
function valueAt(example, path) {
  return path.split(".").reduce((value, key) => value?.[key], example);
}

function setAt(example, path, value) {
  const keys = path.split(".");
  const last = keys.pop();
  const owner = keys.reduce((inner, key) => inner[key], example);
  owner[last] = value;
}

// ---- Computing ----------------------------------------------------------------------------------

/* The command for the topic as it stands. A topic with numbers of its own takes no example. */
function explainCommand() {
  const { topic } = shown;
  const words = ["explain", topic, "--language", language];
  if (TOPICS[topic].prompt !== undefined) return [...words, "--prompt", shown.prompt];
  if (!isEditable(topic)) return [...words, ...shown.flags];
  app.side.write("example.json", JSON.stringify(shown.example));
  return [...words, "--example", "example.json"];
}

function isEditable(topic) {
  const { fields, table, answers, sides } = TOPICS[topic];
  return Boolean(fields || table || answers || sides);
}

/* Runs the program on the example, twice: for the text that is read, and for its numbers. */
const compute = latest(async (isMarked = true) => {
  const begin = performance.now();
  const { topic } = shown;
  const error = byId("explain-error");
  try {
    const command = explainCommand();
    const input = isEditable(topic) ? JSON.stringify(shown.example) : "{}";
    const text = await ask(command);
    const json = await ask([...command, "--json"]);
    if (topic !== shown.topic) return;
    const result = byId("explained");
    result.dataset.example = input;
    result.dataset.json = json.trim();
    const before = isMarked ? shown.result : null;
    shown.result = JSON.parse(json);
    const count = drawExplained(text, isMarked ? shown.text : "");
    shown.text = text;
    error.hidden = true;
    const time = t("numbers.time", { ms: number(performance.now() - begin, 0) });
    const became = sayChanged(before, shown.result);
    byId("explain-time").textContent = [count > 0 ? t("numbers.marked", { count }) : "", became,
      time].filter(part => part).join(" · ");
  } catch (problem) {
    // a number that does not fit: the program says which, and what it expects
    error.textContent = problem.message.replace(/^example\.json: /, "");
    error.hidden = false;
  }
});

/* The single numbers of a topic that have changed, in words: "loss 0.6539 → 0.6163". */
function sayChanged(before, after) {
  const inputs = TOPICS[shown.topic].fields ?? [];
  return Object.entries(after)
    .filter(([name, value]) => typeof value === "number" && !inputs.includes(name) &&
      typeof before?.[name] === "number" && Math.abs(before[name] - value) > 1e-4)
    .map(([name, value]) => t("numbers.became", { name, before: number(before[name], 4),
      after: number(value, 4) })).join(", ");
}

// ---- What was printed ---------------------------------------------------------------------------

const NUMBER = /(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)/;

/* drawExplained -- the text as paragraphs and tables. A number that differs from the last text is
 * marked. Returns how many are. */
function drawExplained(text, before) {
  const old = before.split("\n\n");
  const isComparable = before !== "";
  let count = 0;
  const texts = text.replace(/\n+$/, "").split("\n\n");
  // what the idea is stands above the question
  const isIntroduced = isProse(texts[0]);
  byId("topic-about").textContent = isIntroduced ? texts[0].replaceAll("\n", " ") : "";
  const blocks = texts.map((block, i) => {
    if (isIntroduced && i === 0) return "";
    const known = isComparable ? (old[i] ?? "").split(NUMBER) : null;
    const pieces = block.split(NUMBER).map((piece, k) => {
      const isNumber = k % 2 === 1;
      if (!isNumber) return isProse(block) ? piece.replaceAll("\n", " ") : piece;
      if (!known || isSameNumber(known[k], piece)) return piece;
      count++;
      return el("mark", {}, piece);
    });
    return el(isProse(block) ? "p" : "pre", {}, ...pieces.flatMap(withFunctions));
  });
  byId("explained").replaceChildren(...blocks.filter(block => block !== ""));
  return count;
}

/* The same, or apart by no more than the last digit's rounding. */
function isSameNumber(before, now) {
  if (before === now) return true;
  const digits = (now.split(".")[1] ?? "").length;
  return digits >= 3 && Math.abs(Number(before) - Number(now)) < 1.5 * 10 ** -digits;
}

/* Running text, not a table or formulas: no line is indented, none has columns. */
function isProse(block) {
  return block.split("\n").every(line => /^\S/.test(line) && !/\S {3,}\S/.test(line)) &&
    block.length > 40;
}

/* Names of functions of align.c become buttons that show them. */
function withFunctions(piece) {
  if (typeof piece !== "string") return [piece];
  return piece.split(/\b([a-z]+(?:_[a-z0-9]+)+|softmax|sigmoid|argmax|gae|whiten)\b/)
    .map((word, i) => i % 2 && functions().has(word) && isNamed(piece, word)
      ? functionButton(word) : word);
}

/* "gae" and the like are words of the text, too: a function stands at the end of a line. */
function isNamed(piece, word) {
  return word.includes("_") || new RegExp(`  ${word}\\s*(\\n|$)`).test(piece);
}

// ---- What can be changed ------------------------------------------------------------------------

function exampleField(path, name) {
  const value = valueAt(shown.example, path);
  const test = `explain-${path.replaceAll(".", "-")}`;
  const changed = number => {
    setAt(shown.example, path, number);
    compute();
  };
  if (name in CHOICES) return choiceField(path, name, value);
  const [low, high, step] = RANGES[name];
  return field({ name, label: name, about: t(`hint.${name}`), low, high, step, value, test,
    changed });
}

function choiceField(path, name, value) {
  const choose = el("select", { id: `field-${name}`, "data-test": `explain-${name}`,
    change: event => {
      setAt(shown.example, path, event.target.value);
      compute();
    } },
  ...CHOICES[name].map(one => el("option", { value: one, selected: one === value }, one)));
  return el("div", { class: "field" }, el("label", { for: `field-${name}` }, name),
    choose, el("span", { class: "about" }, t(`hint.${name}`)));
}

/* Lists side by side: a row for each token, a column for each list. */
function exampleTable(owner, columns, tokens) {
  const at = (column, i) => `${owner}${column}.${i}`;
  const count = valueAt(shown.example, `${owner}${columns[0]}`).length;
  const rows = Array.from({ length: count }, (_, i) => el("tr", {},
    el("th", { scope: "row", class: "text" }, harmless(JSON.stringify(tokens?.[i] ?? i))),
    ...columns.map(column => el("td", {}, tableInput(at(column, i), `${column}, ${i}`)))));
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, t("token")),
      ...columns.map(column => el("th", { scope: "col" }, ...breakable(column))))),
    el("tbody", {}, ...rows)));
}

/* A long name may be broken after "_". */
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part, i) => i ? [el("wbr"), part] : [part]);
}

function tableInput(path, label) {
  // four digits are shown; the example keeps what the models gave
  const value = Number(valueAt(shown.example, path).toFixed(4));
  return el("input", { type: "number", step: 0.1, value,
    "aria-label": label, "data-test": `explain-${path.replaceAll(".", "-")}`,
    input: event => {
      if (event.target.value === "") return;
      setAt(shown.example, path, Number(event.target.value));
      compute();
    } });
}

function group(title, ...content) {
  return el("fieldset", {}, el("legend", {}, title), ...content);
}

function drawControls() {
  const { fields = [], table, answers, sides, prompt } = TOPICS[shown.topic];
  const { example } = shown;
  const parts = fields.length === 0 ? []
    : [el("div", { class: "fields" }, ...fields.map(name => exampleField(name, name)))];
  if (table) parts.push(group(t("logits"), exampleTable("", table, example.tokens)));
  for (const side of sides ?? []) {
    const columns = [`${side}_logprobs`, `ref_${side}_logprobs`];
    parts.push(group(t(side), exampleTable("", columns, example[`${side}_tokens`])));
  }
  if (answers) {
    parts.push(el("div", { class: "answers" }, ...example.answers.map((answer, i) => group(
      t("answer", { n: i + 1 }),
      ...(answers.fields ?? []).map(name => exampleField(`answers.${i}.${name}`, name)),
      exampleTable(`answers.${i}.`, answers.table, answer.tokens)))));
  }
  if (prompt !== undefined) parts.push(promptField());
  if (parts.length === 0) parts.push(el("p", { class: "quiet" }, t("numbers.fixed")));
  const back = el("button", { type: "button", click: openExample }, t("numbers.reset"));
  if (isEditable(shown.topic)) parts.push(el("p", { class: "buttons" }, back));
  const head = isEditable(shown.topic) || prompt !== undefined
    ? [el("h2", {}, t("numbers.change"))] : [];
  byId("controls").replaceChildren(...head, ...ownModels(), ...parts);
  // many columns want the whole width
  const isWide = (answers?.table.length ?? 0) > 2;
  byId("controls").parentElement.classList.toggle("stacked", isWide);
}

function promptField() {
  const box = el("input", { id: "explain-prompt", "data-test": "explain-prompt", value: shown.prompt,
    maxlength: 40, autocomplete: "off", input: event => {
      shown.prompt = event.target.value || " ";
      compute();
    } });
  return el("p", { class: "wide" }, el("label", { for: "explain-prompt" }, t("numbers.word")), box);
}

/* The example from the reader's own models, where the topic takes some and there are some. */
function ownModels() {
  if (!TOPICS[shown.topic].models || !hasModel("ppo")) return [];
  const box = el("input", { type: "checkbox", id: "own-models", "data-test": "explain-own",
    change: event => {
      shown.isOwn = event.target.checked;
      drawQuestion();
      openExample();
    } });
  box.checked = Boolean(shown.isOwn);
  const note = box.checked ? [el("p", { class: "quiet" }, t("numbers.own.on"))] : [];
  return [el("p", {}, el("label", {}, box, ` ${t("numbers.own")}`)), ...note];
}

function isOwnShown() {
  return Boolean(shown.isOwn && TOPICS[shown.topic].models && hasModel("ppo"));
}

/* The flags of real models: the policy after PPO, the language model as its reference. */
function modelFlags() {
  const flags = { model: ["--model_name_or_path", "out/ppo"],
    ref: ["--ref_model", "out/language_model"],
    reward: ["--reward_model_path", "out/reward_model"] };
  return TOPICS[shown.topic].models.flatMap(name => flags[name]).concat("--prompt", "The film is");
}

/* The example as the program has it built in, or as the models make it. */
async function openExample() {
  const { topic } = shown;
  const { prompt } = TOPICS[topic];
  const isOwn = isOwnShown();
  shown.flags = isOwn ? modelFlags() : [];
  shown.text = "";
  shown.result = null;
  if (prompt !== undefined) shown.prompt = prompt;
  const folders = isOwn ? ["out/ppo", "out/language_model", "out/reward_model"] : [];
  try {
    const json = await ask(["explain", topic, "--json", ...shown.flags], folders);
    if (topic !== shown.topic) return;
    shown.example = JSON.parse(json);
    drawControls();
    await compute(false);
  } catch (problem) {
    byId("explain-error").textContent = problem.message;
    byId("explain-error").hidden = false;
  }
}

// ---- Predict first ------------------------------------------------------------------------------

function questions() {
  return predictions().filter(({ topic }) => topic === shown.topic);
}

/* The question that is next, with a box for each number that is asked for. */
function drawQuestion() {
  const list = questions();
  const panel = byId("predict");
  const asked = list[shown.asked];
  // a question is about the built-in example
  panel.hidden = !asked || isOwnShown();
  if (panel.hidden) return;
  const guesses = asked.read.map(path => el("label", {}, t("predict.guess", { name: nameOf(path) }),
    el("input", { type: "number", step: "any", "data-path": path })));
  const answer = el("div", { id: "predict-answer", role: "status" });
  const form = el("form", { class: "guesses", submit: event => {
    event.preventDefault();
    answerQuestion(asked, form, answer);
  } }, ...guesses,
  el("button", { class: "main", "data-test": "predict-check" }, t("predict.check")),
  el("button", { type: "button", click: nextQuestion }, t("predict.skip")));
  panel.replaceChildren(
    el("h2", {}, t("predict.title"), " ", el("span", { class: "quiet" },
      t("predict.of", { n: shown.asked + 1, count: list.length }))),
    el("p", {}, ...withCode(asked[language].question)), form, answer);
}

/* "answers.0.raw_advantages.3" as a reader says it: answer 1, raw_advantages[3]. */
function nameOf(path) {
  const [, answer, rest] = /^(?:answers\.(\d+)\.)?(.*)$/.exec(path);
  const name = rest.replace(/\.(\d+)$/, "[$1]");
  return answer === undefined ? name : `${t("answer", { n: Number(answer) + 1 })}, ${name}`;
}

/* How good a guess is, for a number that was `base` before the change. */
function verdictOf(guess, value, base) {
  const off = Math.abs(guess - value);
  const size = Math.max(0.1, Math.abs(value));
  if (off <= 0.006 * size) return "right";
  if (off <= 0.06 * size) return "close";
  const isUnchanged = Math.abs(value - base) <= 1e-4 * size;
  return !isUnchanged && Math.sign(guess - base) === Math.sign(value - base) ? "way" : "far";
}

/* The change that the question speaks of is made in the example, and the program computes it. */
async function answerQuestion(asked, form, place) {
  const guesses = [...form.querySelectorAll("input")].map(({ value }) => value);
  shown.isOwn = false;
  await openExample();
  const base = shown.result;
  for (const [path, value] of Object.entries(asked.change)) setAt(shown.example, path, value);
  drawControls();
  await compute();
  const lines = asked.read.map((path, i) => {
    const value = valueAt(shown.result, path);
    const isGuessed = guesses[i] !== "";
    const values = { name: nameOf(path), value: number(value, 4),
      guess: number(Number(guesses[i]), 4) };
    return el("li", { class: "guess" },
      t(isGuessed ? "predict.computed" : "predict.alone", values),
      isGuessed ? ` ${t(`predict.${verdictOf(Number(guesses[i]), value, valueAt(base, path))}`)}` : "");
  });
  place.replaceChildren(el("ul", {}, ...lines),
    el("p", {}, ...withCode(asked[language].answer)));
  const isLast = shown.asked + 1 >= questions().length;
  if (!isLast) {
    place.append(el("p", { class: "buttons" },
      el("button", { type: "button", click: nextQuestion }, t("predict.next"))));
  }
}

/* The next question starts from the example as it was; after the last one, the next idea. */
function nextQuestion() {
  shown.asked++;
  drawQuestion();
  openExample();
}

function drawNextIdea() {
  const next = COURSE_TOPICS[COURSE_TOPICS.indexOf(shown.topic) + 1];
  const isThere = COURSE_TOPICS.includes(shown.topic) && next;
  byId("next-idea").replaceChildren(...isThere ? [el("button", { type: "button",
    click: () => chooseTopic(next).then(() => scrollTo(0, 0)) }, t("numbers.next", { name: next }))] : []);
}

// ---- The screen ---------------------------------------------------------------------------------

/* The topics' titles, in the reader's language, as the program lists them. */
async function readTopics() {
  const text = await ask(["explain", "--language", language]);
  shown.names = new Map([...text.matchAll(/^ {2}(\w+) +(.*)$/gm)].map(([, name, title]) =>
    [name, title]));
}

async function chooseTopic(topic) {
  shown.topic = topic;
  shown.asked = 0;
  byId("topic").value = topic;
  drawQuestion();
  drawNextIdea();
  drawRead("numbers-read", TOPICS[topic].terms, TOPIC_FUNCTIONS[topic]);
  await openExample();
}

const TOPIC_FUNCTIONS = {
  bpe: ["tokenizer_encode_word"],
  softmax: ["softmax", "log_sum_exp", "entropy_of_logits"],
  sampling: ["process_logits", "process_top_k", "top_p_cut", "token_at"],
  beam: ["beam_advance", "beam_search"],
  omega: ["sequence_logprob"],
  kl: ["kl_exact", "kl_k1", "kl_k3"],
  reward: ["bradley_terry_pair", "sigmoid"],
  reinforce: ["reinforce_advantages", "reinforce_loss"],
  gae: ["gae_step", "gae", "whiten"],
  ppo: ["ppo_rewards", "ppo_token_loss", "ppo_value_loss", "ppo_loss"],
  grpo: ["grpo_advantages", "grpo_token_loss", "grpo_token_share", "grpo_loss"],
  dpo: ["dpo_pair_loss", "sequence_logprob"],
  exact: ["exact_optimum", "exact_figures"],
  attention: ["attention_scores", "attention_softmax", "attention_forward"],
  backprop: ["ppo_loss", "lm_head_backward", "block_backward", "embedding_backward"],
  lora: ["lora_forward", "lora_backward", "lora_merge"],
  adamw: ["optimizer_step"],
};

async function drawNumbers() {
  await readTopics();
  const option = name => el("option", { value: name }, `${name}: ${shown.names.get(name) ?? ""}`);
  const others = Object.keys(TOPICS).filter(name => !COURSE_TOPICS.includes(name));
  byId("topic").replaceChildren(
    el("optgroup", { label: t("numbers.course") }, ...COURSE_TOPICS.map(option)),
    el("optgroup", { label: t("numbers.deeper") }, ...others.map(option)));
  await chooseTopic(shown.topic);
}

function startNumbers() {
  byId("topic").addEventListener("change", event => chooseTopic(event.target.value));
  byId("controls").addEventListener("submit", event => event.preventDefault());
}
