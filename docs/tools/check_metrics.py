#!/usr/bin/env python3
"""check_metrics.py - each metric that align writes is explained in docs/metrics.md, and vice versa.

    make && python3 docs/tools/check_metrics.py

About 20 seconds; ends with 'N passed, N failed'; Python 3.8 or later. Runs each command with a
model of 24,496 weights, collects the keys of trainer_state.json's log_history, stats_all.jsonl,
summary.json, `eval` and `make bench BENCH=--json`, and compares them with the tables. A heading "##
`sft`, `dpo`: ..." names the commands that its tables speak of; the backticked words of a row's
first cell are keys; they may be missing from these runs if the cell ends in (optional).
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
ALIGN = os.path.join(ROOT, "align")
BENCH = os.path.join(ROOT, "align_bench")
if not os.path.exists(ALIGN):
    sys.exit("%s: is not there; run make first" % ALIGN)
COMMANDS = ("pretrain", "sft", "reward", "dpo", "reinforce", "grpo", "ppo", "rlhf", "eval", "bench")
TINY = "--vocab_size 300 --n_layer 1 --n_head 2 --n_embd 16"
FEW = "--max_steps 2 --logging_steps 1 --quiet"
ROLL = "--model_name_or_path pretrain --dataset_name prompts --reward_model_path reward"
ROLL += " --batch_size 4 " + FEW


def explained():
    """docs/metrics.md -> {command: {key: is it optional}}."""
    keys, commands = collections.defaultdict(dict), []
    with open(os.path.join(ROOT, "docs", "metrics.md"), encoding="utf-8") as f:
        for line in f:
            if line.startswith("#"):
                commands = [c for c in re.findall("`([^`]+)`", line) if c in COMMANDS]
            elif line.startswith("| `"):
                cell = line.split("|")[1].strip()
                optional = cell.endswith("(optional)")
                for command in commands:
                    keys[command].update(dict.fromkeys(re.findall("`([^`]+)`", cell), optional))
    return keys


def keys_of(item, prefix=""):
    """Keys of an object, or of a list of them; those of nested objects joined by dots: "ppo.kl"."""
    keys = set()
    if isinstance(item, list):
        for x in item:
            keys |= keys_of(x, prefix)
    else:
        for k, x in item.items():
            keys |= keys_of(x, prefix + k + ".") if isinstance(x, dict) else {prefix + k}
    return keys


def run(work, arguments):
    command = [ALIGN, *arguments.split()]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        sys.exit("align %s: exit %d: %s" % (arguments, done.returncode, said))
    return done.stdout.decode(errors="replace")


def read_lines(*path):
    with open(os.path.join(*path), encoding="utf-8") as f:
        return f.readlines()


def written(work):
    """Runs everything -> {command: {key}}."""
    keys = collections.defaultdict(set)
    rated = [json.loads(line) for line in read_lines(ROOT, "docs", "reviews.jsonl")[:240]]
    shapes = {
        "rated": rated,
        "text": [{"text": r["text"]} for r in rated[:40]],
        "label": [{"text": r["text"], "label": r["score"] > 0} for r in rated[:40]],
        "pairs": [{"prompt": "The film is", "chosen": " good", "rejected": " bad"}] * 8,
        "prompts": [{"prompt": "The film"}] * 8,
    }
    for name, rows in shapes.items():
        with open(os.path.join(work, name), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    with open(os.path.join(work, "judge"), "w", encoding="utf-8") as f:
        f.write("#!/bin/sh\necho null\nread first\nwhile read line; do echo $((n += 1)); done\n")
    os.chmod(os.path.join(work, "judge"), 0o755)
    subprocess.run(["make", "-s", "align_bench"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    one = subprocess.run(
        [BENCH, *TINY.split(), "--max_length", "16", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=True,
    )
    keys["bench"] = keys_of(json.loads(one.stdout))
    # the others meanwhile
    bench = subprocess.Popen([BENCH, *TINY.split(), "--json", "--quiet"], stdout=subprocess.PIPE)
    for folder, command, data in (
        ("pretrain", "pretrain", "text"),
        ("sft", "sft", "text"),
        ("reward", "reward", "pairs"),
        ("labels", "reward", "label"),
        ("dpo", "dpo", "pairs"),
    ):
        if command == "pretrain":
            more = TINY + " --n_positions 256"
        else:
            more = "--model_name_or_path pretrain" + " --loss_type bce" * (data == "label")
        files = "--dataset_name %s --eval_dataset %s --output_dir %s" % (data, data, folder)
        run(work, "%s %s %s %s" % (command, more, files, FEW))
    run(work, "reinforce %s --num_generations 2 --output_dir reinforce" % ROLL)
    grpo = ROLL.replace("--batch_size", "--per_device_train_batch_size")
    run(work, "grpo %s --num_generations 2 --beta 0.1 --output_dir grpo" % grpo)
    run(work, "ppo %s --mini_batch_size 2 --output_dir ppo" % ROLL)
    steps = "--pretrain_steps 4 --reward_steps 2 --ppo_steps 1 --dpo_steps 2"
    run(work, "rlhf --model_name_or_path pretrain --dataset_name rated --output_dir rlhf " + steps)
    folders = {
        "rlhf/language_model": "pretrain",
        "rlhf/reward_model": "reward",
        "rlhf/ppo": "ppo",
        "rlhf/dpo": "dpo",
        "labels": "reward",
    }
    for folder in [*folders, "pretrain", "sft", "reward", "dpo", "reinforce", "grpo", "ppo"]:
        state = json.loads("".join(read_lines(work, folder, "trainer_state.json")))
        keys[folders.get(folder, folder)] |= keys_of(state["log_history"])
    for name in ("ppo", "grpo"):
        for line in read_lines(work, name, "stats_all.jsonl"):
            keys[name] |= keys_of(json.loads(line))
    keys["rlhf"] = keys_of(json.loads("".join(read_lines(work, "rlhf", "summary.json"))))
    for model_and_data in (
        "pretrain --dataset_name text",
        "reward --dataset_name pairs",
        "labels --dataset_name label",
        "reward --dataset_name rated",
        "ppo --dataset_name prompts --ref_model pretrain --reward_model_path reward",
        "ppo --dataset_name prompts --reward_command ./judge --best_of 1,2",
    ):
        said = run(work, "eval --model_name_or_path " + model_and_data)
        keys["eval"] |= keys_of(json.loads(said))
    keys["bench"] |= keys_of(json.loads(bench.communicate()[0]))
    return keys


with tempfile.TemporaryDirectory() as folder:
    wanted, found, failed = explained(), written(folder), 0
for name in COMMANDS:
    unknown = sorted(found[name] - set(wanted[name]))
    absent = [key for key, may_be in wanted[name].items() if not may_be and key not in found[name]]
    wrong = ["writes `%s`, which docs/metrics.md does not explain" % key for key in unknown]
    wrong += ["does not write `%s`, which docs/metrics.md explains" % key for key in absent]
    print("%-4s  %s: %d keys" % ("FAIL" if wrong else "ok", name, len(found[name])))
    for fault in wrong:
        print("      " + name + " " + fault)
    failed += bool(wrong)
print("%d passed, %d failed" % (len(COMMANDS) - failed, failed))
sys.exit(failed > 0)
