#!/usr/bin/env python3
"""check_trainer.py - align's Trainer beside transformers' and TRL's: what they log, on the same tiny model and data.

    make && /tmp/venv_roundtrip/bin/python docs/tools/check_trainer.py [--align ./align]

The Python is that of docs/tools/roundtrip.py, with trl==1.16.0.  Compared: `epoch`, `loss`, `global_step`, `max_steps` and `num_train_epochs`
where micro-batches and accumulations do not divide the data; the figures of an evaluation at several batch sizes;
the totals of a resumed run.  Where align means something else than TRL, TRL's number is computed from align's, so
that both meanings are proved (docs/metrics.md says them).  About 30 seconds; ends with 'N passed, N failed'.
"""
import argparse
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
warnings.filterwarnings("ignore")
try:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    sys.exit("check_trainer.py: %s (in %s). The top of docs/tools/roundtrip.py says what to install." % (error, sys.executable))

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
LIMIT = 1e-4                                   # of a loss or another figure; epochs must be equal to the digits that are written
passed = failed = 0


def check(name, difference, limit=LIMIT):
    global passed, failed
    ok = difference <= limit                   # False for nan
    passed, failed = passed + ok, failed + (not ok)
    print("%-4s %8.2g  %s" % ("ok" if ok else "FAIL", difference, name), flush=True)


def align(*words):
    """Runs align; what it said on stderr, and the JSON object on its stdout, if any."""
    done = subprocess.run([PROGRAM, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit("align %s: exit %d: %s" % (" ".join(map(str, words)), done.returncode, done.stderr.strip()))
    return done.stderr, json.loads(done.stdout) if done.stdout.strip() else None


def write(name, rows):
    with open(name, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def flag_words(flags):
    return [word for name, value in flags.items() for word in ("--" + name, str(value))]


def ours(task, data, flags, out):
    """trainer_state.json of a run of align."""
    said, _ = align(task, "--model_name_or_path", START[task], "--dataset_name", data, *flag_words(flags), "--train_sampling_strategy", "sequential", "--quiet", "--output_dir", out)
    return json.load(open(out + "/trainer_state.json")), said


def theirs(task, data, flags, out, resume=None):
    """The state of a TRL trainer after the same run."""
    flags = {k: v for k, v in flags.items() if k not in ("eval_dataset", "resume_from_checkpoint")} | (
        {"eval_strategy": "steps"} if "eval_steps" in flags else {})
    config, trainer, loader = {"sft": (SFTConfig, SFTTrainer, AutoModelForCausalLM), "dpo": (DPOConfig, DPOTrainer, AutoModelForCausalLM),
                               "reward": (RewardConfig, RewardTrainer, AutoModelForSequenceClassification)}[task]
    rows = [json.loads(line) for line in open(data)]
    arguments = config(output_dir=out, report_to="none", use_cpu=True, bf16=False, train_sampling_strategy="sequential", disable_tqdm=True, **flags)
    model = loader.from_pretrained(START[task], **({"num_labels": 1} if task == "reward" else {}))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer(model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(START[task]),
                          **({"eval_dataset": datasets.Dataset.from_list(rows)} if "eval_steps" in flags else {}))
        trainer.train(resume_from_checkpoint=resume)
    return vars(trainer.state)


def figures(state, key):
    return [entry[key] for entry in state["log_history"] if key in entry]


def apart(a, b):
    """The greatest difference of two lists of numbers."""
    return max((abs(x - y) for x, y in zip(a, b)), default=math.inf) if len(a) == len(b) else math.inf


def steps_and_epochs():
    """Rows that micro-batches, and micro-batches that accumulations do not divide."""
    for task, data, n, batch, accumulation, length in (
            ("sft", "text", 5, 1, 4, {"num_train_epochs": 1}), ("sft", "text", 7, 2, 3, {"num_train_epochs": 2}), ("sft", "completions", 5, 2, 2, {"max_steps": 5}),
            ("sft", "completions", 3, 8, 4, {"max_steps": 2}), ("sft", "text", 7, 2, 1, {"num_train_epochs": 1.5}), ("dpo", "pairs", 7, 2, 3, {"max_steps": 3}),
            ("reward", "pairs", 7, 2, 3, {"max_steps": 3})):
        rows = [json.loads(line) for line in open(data + ".jsonl")][:n]
        write("some.jsonl", rows)
        flags = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 1000, **length}
        (a, _), b = ours(task, "some.jsonl", flags, "align_run"), theirs(task, "some.jsonl", flags, "trl_run")
        name = "%s, %d rows by %d, accumulation %d, %s" % (task, n, batch, accumulation, " ".join("%s %g" % item for item in length.items()))
        check(name + ": epoch", apart(figures(a, "epoch"), figures(b, "epoch")), 1e-8)
        check(name + ": step, global_step, max_steps, num_train_epochs", apart(figures(a, "step") + [a[k] for k in ("global_step", "max_steps", "num_train_epochs")],
                                                                            figures(b, "step") + [b[k] for k in ("global_step", "max_steps", "num_train_epochs")]), 0)
        check(name + ": loss", apart(figures(a, "loss"), figures(b, "loss")))
        shared = sorted(k for k in a["log_history"][0] if k in b["log_history"][0] and k not in ("epoch", "step", "loss", "learning_rate"))
        check(name + ": " + ", ".join(shared), max(apart(figures(a, k), figures(b, k)) for k in shared))
        check(name + ": train_loss", apart(figures(a, "train_loss"), figures(b, "train_loss")))
        if not (task == "sft" and accumulation == 3):
            continue
        flags["logging_steps"] = 2             # two steps' mean
        (a, _), b = ours(task, "some.jsonl", flags, "align_run"), theirs(task, "some.jsonl", flags, "trl_run")
        for key in ("loss", "entropy", "mean_token_accuracy"):
            check(name + ": %s of two steps" % key, apart(figures(a, key), figures(b, key)))


def evaluations():
    """eval_loss at several batch sizes: align's is one number; TRL's is the mean of the batches' means, weighted by rows, so
    that it is align's where all rows are one batch, and of losses a pair at any size."""
    for task, data in (("sft", "text"), ("sft", "completions"), ("dpo", "pairs"), ("reward", "pairs")):
        rows = [json.loads(line) for line in open(data + ".jsonl")]
        n, here, there = len(rows), {}, {}
        for batch in (1, 3, n):
            flags = {"per_device_eval_batch_size": batch, "eval_steps": 1, "eval_dataset": data + ".jsonl", "max_steps": 1, "learning_rate": 0, "save_steps": 1000}
            entries = ours(task, data + ".jsonl", flags, "align_run")[0]["log_history"]
            here[batch] = {k: v for k, v in next(e for e in entries if "eval_loss" in e).items() if "second" not in k and "runtime" not in k}
            there[batch] = next(e for e in theirs(task, data + ".jsonl", flags, "trl_run")["log_history"] if "eval_loss" in e)
        name = "%s, %s, evaluated in batches of " % (task, data)
        for batch in (1, 3):
            check(name + "%d as of %d: every figure of align" % (batch, n), apart(list(here[batch].values()), list(here[n].values())), 1e-5)
        both = sorted(k for k in here[n] if k in there[n] and k.startswith("eval_"))
        check(name + "%d: %s" % (n, ", ".join(both)), apart([here[n][k] for k in both], [there[n][k] for k in both]))
        for batch in (1, 3):
            means = here[n]["eval_loss"]       # of pairs
            if task == "sft":
                means = 0
                for first in range(0, n, batch):
                    part = rows[first:first + batch]
                    write("part.jsonl", part)
                    means += len(part) / n * align("eval", "--model_name_or_path", START[task], "--dataset_name", "part.jsonl")[1]["eval_loss"]
            check(name + "%d: TRL's eval_loss is %.4f, align's %.4f; TRL's from align's batches" % (batch, there[batch]["eval_loss"], here[n]["eval_loss"]), abs(there[batch]["eval_loss"] - means))
        if task == "sft":
            check(name + "any size: eval_loss of a training is that of align eval", abs(align("eval", "--model_name_or_path", START[task], "--dataset_name", data + ".jsonl")[1]["eval_loss"] - here[1]["eval_loss"]), 1e-6)


def resumed():
    """A run of 6 steps of 3 an epoch, and what is left of it after step 4; then resumed where it is complete."""
    flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2, "max_steps": 6}
    data = "text.jsonl"
    (a, _), b = ours("sft", data, flags, "align_whole"), theirs("sft", data, flags, "trl_whole")
    check("sft, whole: loss of 6 steps", apart(figures(a, "loss"), figures(b, "loss")))
    total = figures(a, "train_loss")[0]
    rest, _ = ours("sft", data, {**flags, "resume_from_checkpoint": "align_whole/checkpoint-4"}, "align_rest")
    there = theirs("sft", data, flags, "trl_rest", "trl_whole/checkpoint-4")
    check("sft, resumed at step 4: loss, epoch, step of every entry", apart(*([x for k in ("loss", "epoch", "step") for x in figures(s, k)][:18] for s in (rest, there))))
    check("sft, resumed at step 4: global_step, max_steps", apart(*([s["global_step"], s["max_steps"]] for s in (rest, there))), 0)
    check("sft, resumed at step 4: train_loss of align is the whole run's", abs(figures(rest, "train_loss")[0] - total), 0)
    check("sft, resumed at step 4: train_loss of transformers is that of steps 5 and 6, not of the run", abs(figures(there, "train_loss")[0] - sum(figures(rest, "loss")[4:]) / 2))
    for steps in (6, 3):
        state, said = ours("sft", data, {**flags, "max_steps": steps, "resume_from_checkpoint": "align_whole/checkpoint-6"}, "align_rest")
        there = theirs("sft", data, {**flags, "max_steps": steps}, "trl_rest", "trl_whole/checkpoint-6")
        same = all(state[k] == a[k] for k in ("global_step", "max_steps", "num_train_epochs", "epoch")) and state["log_history"] == a["log_history"]
        check("sft, complete, resumed with max_steps %d: align changes no figure (transformers: global_step %d, max_steps %d, train_loss %g)" % (
            steps, there["global_step"], there["max_steps"], figures(there, "train_loss")[-1]), 0 if same else math.inf)
        check("sft, complete, resumed with max_steps %d: one note" % steps, abs(said.count("no step is left to train") - 1) + abs(said.count("note:") - 1), 0)


parser = argparse.ArgumentParser(description="Compares what align's Trainer logs with transformers' and TRL's.")
parser.add_argument("--align", default=os.path.join(ROOT, "align"))
PROGRAM = os.path.realpath(parser.parse_args().align)
torch.manual_seed(0)
torch.set_num_threads(1)
datasets.disable_progress_bars()
disable_progress_bar()
work = tempfile.mkdtemp(prefix="check_trainer.")
os.chdir(work)
try:
    texts = [json.loads(line)["text"] for line in open(os.path.join(ROOT, "docs/reviews.jsonl"), encoding="utf-8")][:22]
    texts = [" ".join(text.split()[:2 + 3 * i % 11]) for i, text in enumerate(texts)]          # of 2 to 12 words
    write("text.jsonl", [{"text": text} for text in texts[:11]])
    write("completions.jsonl", [{"prompt": "The film is", "completion": " " + text} for text in texts[:11]])
    write("pairs.jsonl", [{"prompt": "The film is", "chosen": " " + a, "rejected": " " + b} for a, b in zip(texts[:11], texts[11:])])
    START = {"sft": "lm", "dpo": "lm", "reward": "rm"}
    align(*"pretrain --dataset_name text.jsonl --vocab_size 513 --n_layer 1 --n_head 2 --n_embd 16 --n_positions 64 --max_length 16 --max_steps 20 --learning_rate 1e-2 --quiet --output_dir lm".split())
    align(*"reward --model_name_or_path lm --dataset_name pairs.jsonl --max_steps 2 --learning_rate 1e-2 --quiet --output_dir rm".split())
    steps_and_epochs()
    evaluations()
    resumed()
finally:
    os.chdir("/")
    shutil.rmtree(work)
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed > 0)
