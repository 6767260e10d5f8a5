"use strict";
/* keep.js -- the last screen: the run as a .zip, and back; and where one goes from here. */

/* The files that are worth keeping: all of the run but its checkpoints and what was cut off. */
function keptFiles() {
  const files = {};
  for (const [path, data] of app.engine.files) {
    const isKept = path.startsWith("out/") && !/checkpoint-\d+|\.tmp$/.test(path);
    if (isKept) files[path] = data;
  }
  return files;
}

/* What the first screen shows of the run, beside the run's own files: curves and samples as they
 * were seen. */
const SEEN = "out/page.json";

function saveRun() {
  const files = keptFiles();
  const said = byId("keep-said");
  if (Object.keys(files).length === 0) {
    said.textContent = t("keep.empty");
    return;
  }
  files[SEEN] = new TextEncoder().encode(JSON.stringify(course.stages));
  const bytes = Engine.zip(files);
  window.alignSaved = bytes;
  const name = "align-run.zip";
  const address = URL.createObjectURL(new Blob([bytes], { type: "application/zip" }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
  said.textContent = t("keep.saved", { name, size: fileSize(bytes.length) });
}

/* A .zip that this page saved, or folders from elsewhere under out/. Nothing is taken over unless
 * all of it can be read. */
async function loadRun(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  const said = byId("keep-said");
  try {
    if (app.engine.running) throw new Error(t("busy"));
    const all = Object.entries(await Engine.unzip(new Uint8Array(await file.arrayBuffer())));
    const files = all.filter(([path]) => path.startsWith("out/") && !path.includes(".."));
    if (files.length === 0) throw new Error("out/ …");
    app.engine.remove("out");
    app.lent.clear();
    for (const [path, data] of files) app.engine.write(path, data);
    takeRun();
    said.dataset.state = "done";
    said.textContent = t("keep.loaded", { count: files.length, name: file.name });
  } catch (error) {
    said.dataset.state = "failed";
    said.textContent = t("keep.bad", { name: file.name, message: error.message });
  }
}

/* The run of the files that are there, on all screens: as far as they tell, it is done. */
function takeRun() {
  Object.assign(course, { stages: freshStages(), judged: null, gone: 0, isLoaded: true });
  const folders = ["language_model", "reward_model", "ppo", "dpo"];
  folders.forEach((folder, i) => {
    const state = JSON.parse(app.engine.text(`out/${folder}/trainer_state.json`) ?? "null");
    if (!state) return;
    const stage = course.stages[i];
    Object.assign(stage, { state: "done", step: state.global_step, total: state.global_step });
    for (const entry of state.log_history) {
      for (const metric of Object.keys(CURVES)) {
        if (!Number.isFinite(entry[metric])) continue;
        (stage.points[metric] ??= []).push({ x: entry.step, y: entry[metric] });
      }
    }
  });
  const seen = JSON.parse(app.engine.text(SEEN) ?? "null");
  if (seen?.length === STAGES.length) course.stages = seen;
  const summary = JSON.parse(app.engine.text("out/summary.json") ?? "null");
  course.gone = summary?.seconds ?? 0;
  setCourse(summary ? "done" : "idle");
  showResults();
  drawNumbers();
}

function drawFiles() {
  const rows = Object.entries(keptFiles()).sort(([a], [b]) => a < b ? -1 : 1);
  byId("files").replaceChildren(
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, t("keep.file")),
      el("th", { scope: "col", class: "numbers" }, t("keep.size")))),
    el("tbody", {}, ...rows.length > 0 ? rows.map(([path, data]) => el("tr", {},
      el("td", {}, path), el("td", { class: "numbers" }, fileSize(data.length))))
      : [el("tr", {}, el("td", { colspan: 2 }, t("keep.none")))]));
  byId("save").disabled = rows.length === 0;
}

const CODE_ALIGN = `make
unzip align-run.zip
./align generate --model_name_or_path out/ppo --prompt "The film is" --do_sample --top_k 0 --temperature 0.7
./align dpo --model_name_or_path out/language_model --dataset_name out/my_preferences.jsonl --learning_rate 6e-4 --max_steps 40 --per_device_train_batch_size 8 --output_dir out/mine2
./align explain ppo --model_name_or_path out/ppo --ref_model out/language_model --reward_model_path out/reward_model --prompt "The film is"
make run`;

const CODE_TRL = `mkdir -p out/pairs && cp out/my_preferences.jsonl out/pairs/train.jsonl
trl dpo --model_name_or_path out/language_model --dataset_name out/pairs --learning_rate 6e-4 --max_steps 40 --per_device_train_batch_size 8 --output_dir out/trl_dpo
trl dpo --num_processes 4 --model_name_or_path gpt2 --dataset_name out/pairs --output_dir out/trl_gpt2
python3 -c "from transformers import pipeline; print(pipeline('text-generation', 'out/ppo')('The film is'))"`;

function drawKeep() {
  drawFiles();
  byId("code-align").textContent = CODE_ALIGN;
  byId("code-trl").textContent = CODE_TRL;
  drawRead("keep-read", ["Hugging Face", "AutoModelForCausalLM", "Trainer.train()", "trainer.state"],
    ["model_save", "trainer_state_save"]);
}

function startKeep() {
  byId("save").addEventListener("click", saveRun);
  byId("load").addEventListener("change", loadRun);
}
