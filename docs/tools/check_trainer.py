#!/usr/bin/env python3
"""check_trainer.py - align's Trainer beside transformers' and TRL's, on one tiny model and data.

    make && /tmp/venv_roundtrip/bin/python docs/tools/check_trainer.py [--align ./align]

The Python is that of docs/tools/roundtrip.py, with trl==1.16.0. Compared: `epoch`, `loss`,
`global_step`, `max_steps` and `num_train_epochs` where micro-batches and accumulations do not
divide the data; the figures of an evaluation at several batch sizes; the totals of a resumed run.
Where align means something else than TRL, TRL's number is computed from align's, so that both
meanings are proved (docs/metrics.md says them). About 30 seconds; ends with 'N passed, N failed'.
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

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
warnings.filterwarnings("ignore")
try:
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    message = (
        "check_trainer.py: %s (in %s). The top of docs/tools/roundtrip.py says what to install."
    )
    sys.exit(message % (error, sys.executable))

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
LIMIT = 1e-4  # of a loss or another figure; epochs must be equal to the digits that are written
passed = failed = 0


def check(name, difference, limit=LIMIT):
    global passed, failed
    ok = difference <= limit  # False for nan
    passed, failed = passed + ok, failed + (not ok)
    print("%-4s %8.2g  %s" % ("ok" if ok else "FAIL", difference, name), flush=True)


def align(*words):
    """Runs align; what it said on stderr, and the JSON object on its stdout, if any."""
    words = [str(word) for word in words]
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip()
        sys.exit("align %s: exit %d: %s" % (" ".join(words), done.returncode, said))
    return done.stderr, json.loads(done.stdout) if done.stdout.strip() else None


def write(name, rows):
    with open(name, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def flag_words(flags):
    return [word for name, value in flags.items() for word in ("--" + name, str(value))]


def ours(task, data, flags, out):
    """trainer_state.json of a run of align, and what it said."""
    flags = {"model_name_or_path": START[task], "dataset_name": data, **flags}
    flags.update(train_sampling_strategy="sequential", output_dir=out)
    said, _ = align(task, "--quiet", *flag_words(flags))
    return json.load(open(out + "/trainer_state.json")), said


def evaluated(task, data):
    """The eval_loss of `align eval`."""
    flags = {"model_name_or_path": START[task], "dataset_name": data}
    return align("eval", *flag_words(flags))[1]["eval_loss"]


def theirs(task, data, flags, out, resume=None):
    """The state of a TRL trainer after the same run."""
    others = ("eval_dataset", "resume_from_checkpoint")
    flags = {name: value for name, value in flags.items() if name not in others}
    rows = datasets.Dataset.from_list([json.loads(line) for line in open(data)])
    given = {"train_dataset": rows}
    if "eval_steps" in flags:
        flags["eval_strategy"] = "steps"
        given["eval_dataset"] = rows
    config, trainer, loader = {
        "sft": (SFTConfig, SFTTrainer, AutoModelForCausalLM),
        "dpo": (DPOConfig, DPOTrainer, AutoModelForCausalLM),
        "reward": (RewardConfig, RewardTrainer, AutoModelForSequenceClassification),
    }[task]
    arguments = config(
        output_dir=out,
        report_to="none",
        use_cpu=True,
        bf16=False,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **flags,
    )
    model = loader.from_pretrained(START[task], **({"num_labels": 1} if task == "reward" else {}))
    tokenizer = AutoTokenizer.from_pretrained(START[task])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer(model=model, args=arguments, processing_class=tokenizer, **given)
        trainer.train(resume_from_checkpoint=resume)
    return vars(trainer.state)


def figures(state, key):
    return [entry[key] for entry in state["log_history"] if key in entry]


def apart(a, b):
    """The greatest difference of two lists of numbers."""
    if len(a) != len(b):
        return math.inf
    return max((abs(x - y) for x, y in zip(a, b)), default=math.inf)


def check_figures(name, a, b, key, limit=LIMIT):
    """That of all entries of two states' logs."""
    check(name, apart(figures(a, key), figures(b, key)), limit)


def steps_and_epochs():
    """Rows that micro-batches, and micro-batches that accumulations do not divide."""
    for task, data, n, batch, accumulation, length in (
        ("sft", "text", 5, 1, 4, {"num_train_epochs": 1}),
        ("sft", "text", 7, 2, 3, {"num_train_epochs": 2}),
        ("sft", "completions", 5, 2, 2, {"max_steps": 5}),
        ("sft", "completions", 3, 8, 4, {"max_steps": 2}),
        ("sft", "text", 7, 2, 1, {"num_train_epochs": 1.5}),
        ("dpo", "pairs", 7, 2, 3, {"max_steps": 3}),
        ("reward", "pairs", 7, 2, 3, {"max_steps": 3}),
    ):
        rows = [json.loads(line) for line in open(data + ".jsonl")][:n]
        write("some.jsonl", rows)
        flags = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 1000,
            **length,
        }
        a, _ = ours(task, "some.jsonl", flags, "align_run")
        b = theirs(task, "some.jsonl", flags, "trl_run")
        steps = " ".join("%s %g" % item for item in length.items())
        name = "%s, %d rows by %d, accumulation %d, %s" % (task, n, batch, accumulation, steps)
        check_figures(name + ": epoch", a, b, "epoch", 1e-8)
        totals = ("global_step", "max_steps", "num_train_epochs")
        whole = [figures(s, "step") + [s[k] for k in totals] for s in (a, b)]
        check(name + ": step, " + ", ".join(totals), apart(*whole), 0)
        check_figures(name + ": loss", a, b, "loss")
        shared = set(a["log_history"][0]) & set(b["log_history"][0])
        shared = sorted(shared - {"epoch", "step", "loss", "learning_rate"})
        worst = max(apart(figures(a, k), figures(b, k)) for k in shared)
        check(name + ": " + ", ".join(shared), worst)
        check_figures(name + ": train_loss", a, b, "train_loss")
        if not (task == "sft" and accumulation == 3):
            continue
        flags["logging_steps"] = 2  # two steps' mean
        a, _ = ours(task, "some.jsonl", flags, "align_run")
        b = theirs(task, "some.jsonl", flags, "trl_run")
        for key in ("loss", "entropy", "mean_token_accuracy"):
            check_figures(name + ": %s of two steps" % key, a, b, key)


def evaluations():
    """eval_loss at several batch sizes.

    align's is one number; TRL's is the mean of the batches' means, weighted by rows, so that it is
    align's where all rows are one batch, and of losses a pair at any size.
    """
    sets = (("sft", "text"), ("sft", "completions"), ("dpo", "pairs"), ("reward", "pairs"))
    for task, data in sets:
        rows = [json.loads(line) for line in open(data + ".jsonl")]
        n, here, there = len(rows), {}, {}
        for batch in (1, 3, n):
            flags = {
                "per_device_eval_batch_size": batch,
                "eval_steps": 1,
                "eval_dataset": data + ".jsonl",
                "max_steps": 1,
                "learning_rate": 0,
                "save_steps": 1000,
            }
            state, _ = ours(task, data + ".jsonl", flags, "align_run")
            entry = next(e for e in state["log_history"] if "eval_loss" in e)
            timeless = [k for k in entry if "second" not in k and "runtime" not in k]
            here[batch] = {k: entry[k] for k in timeless}
            state = theirs(task, data + ".jsonl", flags, "trl_run")
            there[batch] = next(e for e in state["log_history"] if "eval_loss" in e)
        name = "%s, %s, evaluated in batches of " % (task, data)
        for batch in (1, 3):
            difference = apart(list(here[batch].values()), list(here[n].values()))
            check(name + "%d as of %d: every figure of align" % (batch, n), difference, 1e-5)
        both = sorted(k for k in here[n] if k in there[n] and k.startswith("eval_"))
        difference = apart([here[n][k] for k in both], [there[n][k] for k in both])
        check(name + "%d: %s" % (n, ", ".join(both)), difference)
        loss = here[n]["eval_loss"]
        for batch in (1, 3):
            means = loss  # of pairs
            if task == "sft":
                means = 0
                for first in range(0, n, batch):
                    part = rows[first : first + batch]
                    write("part.jsonl", part)
                    means += len(part) / n * evaluated(task, "part.jsonl")
            trl = there[batch]["eval_loss"]
            said = "%d: TRL's eval_loss is %.4f, align's %.4f; TRL's from align's batches"
            check(name + said % (batch, trl, loss), abs(trl - means))
        if task == "sft":
            difference = abs(evaluated(task, data + ".jsonl") - here[1]["eval_loss"])
            said = "any size: eval_loss of a training is that of align eval"
            check(name + said, difference, 1e-6)


def resumed():
    """A run of 6 steps of 3 an epoch, and what is left of it after step 4.

    Then it is resumed where it is complete.
    """
    flags = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "max_steps": 6,
    }
    data = "text.jsonl"
    a, _ = ours("sft", data, flags, "align_whole")
    b = theirs("sft", data, flags, "trl_whole")
    check_figures("sft, whole: loss of 6 steps", a, b, "loss")
    total = figures(a, "train_loss")[0]

    at_4 = {**flags, "resume_from_checkpoint": "align_whole/checkpoint-4"}
    rest, _ = ours("sft", data, at_4, "align_rest")
    there = theirs("sft", data, flags, "trl_rest", "trl_whole/checkpoint-4")
    name = "sft, resumed at step 4: "
    entries = [
        [x for k in ("loss", "epoch", "step") for x in figures(s, k)][:18] for s in (rest, there)
    ]
    check(name + "loss, epoch, step of every entry", apart(*entries))
    totals = [[s["global_step"], s["max_steps"]] for s in (rest, there)]
    check(name + "global_step, max_steps", apart(*totals), 0)
    difference = abs(figures(rest, "train_loss")[0] - total)
    check(name + "train_loss of align is the whole run's", difference, 0)
    of_two = sum(figures(rest, "loss")[4:]) / 2
    said = "train_loss of transformers is that of steps 5 and 6, not of the run"
    check(name + said, abs(figures(there, "train_loss")[0] - of_two))

    for steps in (6, 3):
        flags["max_steps"] = steps
        at_6 = {**flags, "resume_from_checkpoint": "align_whole/checkpoint-6"}
        state, said = ours("sft", data, at_6, "align_rest")
        there = theirs("sft", data, flags, "trl_rest", "trl_whole/checkpoint-6")
        keys = ("global_step", "max_steps", "num_train_epochs", "epoch", "log_history")
        same = all(state[k] == a[k] for k in keys)
        name = "sft, complete, resumed with max_steps %d: " % steps
        step, of, loss = there["global_step"], there["max_steps"], figures(there, "train_loss")[-1]
        figure = "transformers: global_step %d, max_steps %d, train_loss %g" % (step, of, loss)
        check(name + "align changes no figure (%s)" % figure, 0 if same else math.inf)
        notes = said.count("no step is left to train"), said.count("note:")
        check(name + "one note", abs(notes[0] - 1) + abs(notes[1] - 1), 0)


about = "Compares what align's Trainer logs with transformers' and TRL's."
parser = argparse.ArgumentParser(description=about)
parser.add_argument("--align", default=os.path.join(ROOT, "align"))
PROGRAM = os.path.realpath(parser.parse_args().align)
torch.manual_seed(0)
torch.set_num_threads(1)
datasets.disable_progress_bars()
disable_progress_bar()
work = tempfile.mkdtemp(prefix="check_trainer.")
os.chdir(work)
try:
    with open(os.path.join(ROOT, "docs/reviews.jsonl"), encoding="utf-8") as reviews:
        texts = [json.loads(line)["text"] for line in reviews][:22]
    # of 2 to 12 words
    texts = [" ".join(text.split()[: 2 + 3 * i % 11]) for i, text in enumerate(texts)]
    write("text.jsonl", [{"text": text} for text in texts[:11]])
    some = [{"prompt": "The film is", "completion": " " + text} for text in texts[:11]]
    write("completions.jsonl", some)
    pairs = [(" " + a, " " + b) for a, b in zip(texts[:11], texts[11:])]
    some = [{"prompt": "The film is", "chosen": a, "rejected": b} for a, b in pairs]
    write("pairs.jsonl", some)
    START = {"sft": "lm", "dpo": "lm", "reward": "rm"}
    shape = "--vocab_size 513 --n_layer 1 --n_head 2 --n_embd 16 --n_positions 64 --max_length 16"
    few = "--max_steps 20 --learning_rate 1e-2 --quiet --output_dir lm"
    align(*f"pretrain --dataset_name text.jsonl {shape} {few}".split())
    few = "--max_steps 2 --learning_rate 1e-2 --quiet --output_dir rm"
    align(*f"reward --model_name_or_path lm --dataset_name pairs.jsonl {few}".split())
    steps_and_epochs()
    evaluations()
    resumed()
finally:
    os.chdir("/")
    shutil.rmtree(work)
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed > 0)
