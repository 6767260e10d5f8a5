#!/usr/bin/env python3
"""check_outgrow.py -- runs the commands of docs/outgrow.md with align and with TRL: the same log?

    python3 docs/tools/check_outgrow.py --trl /tmp/new --trl011 /tmp/old [--out out] [--processes]

--trl and --trl011: the two environments that docs/outgrow.md installs; --out: models of `make run`
(default: a shortened one is made). Prints the hand-off table, a row a step, and checks that each
trl line has the flags of its align line. --processes: a run of two processes as well. Exit 0: all
passed. Ends with 'N passed, N failed'.
"""

import argparse
import array
import glob
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from check_docs import ROOT, SHORT_RUN, split_commands  # noqa: E402

LIMIT = 1e-4  # of a loss or KL in nats
# the last ones of ppo and grpo, where TRL replays
ALIGN_ONLY = {"--output_dir", "--eval_dataset"} | {"--reward_model_path", "--dataset_name"}
ALIGN_ONLY |= {"--input_min_text_length", "--input_max_text_length"}
TRL_ONLY = {"--output_dir", "--eval_strategy", "--per_device_eval_batch_size"}
TRL_ONLY |= {"--use_cpu", "--bf16", "--rollouts"}

# GRPO: settings that change what is computed, each beside TRL's trainer on stored answers. `far`
# has prompts of unequal lengths, and is an adapter to go on with. The sums run in another order,
# and AdamW divides by the root of tiny second moments: a larger --adam_epsilon keeps a weight with
# next to no gradient from feeling the last digit.
GRPO = "--model_name_or_path out/language_model --per_device_train_batch_size 8 --num_generations 4"
GRPO += " --max_completion_length 16 --learning_rate 1e-3 --adam_epsilon 1e-5"
GRPO_FAR = "./align grpo --reward_model_path out/reward_model --dataset_name out/texts/train.jsonl"
GRPO_FAR += " %s --gradient_accumulation_steps 4 --max_steps 2 --use_peft --lora_r 4" % GRPO
GRPO_FAR += " --output_dir out/align_far"
GRPO_RUNS = {
    "dapo": "far --max_steps 4 --logging_steps 1 --gradient_accumulation_steps 2",
    "grpo, sequence": "far --max_steps 6 --logging_steps 1 --loss_type grpo --beta 0.04"
    " --importance_sampling_level sequence --num_iterations 3 --epsilon 0.01",
    "bnpo, two micro-batches": "far --max_steps 6 --logging_steps 1 --loss_type bnpo --beta 0.04"
    " --use_bias_correction_kl false --num_iterations 3 --gradient_accumulation_steps 2",
    "dr_grpo": "grpo --max_steps 6 --logging_steps 1 --loss_type dr_grpo --scale_rewards none"
    " --epsilon_high 0.28 --num_iterations 3",
    "dapo, sequence": "grpo --max_steps 4 --logging_steps 2 --beta 0.04 --num_iterations 2"
    " --importance_sampling_level sequence --temperature 0.7 --scale_rewards batch"
    " --gradient_accumulation_steps 2",
    "grpo, LoRA": "far --max_steps 4 --logging_steps 1 --loss_type grpo --beta 0.04"
    " --num_iterations 2 --peft_adapter out/align_far",
}
ON_CPU = " --use_cpu --bf16 false --activation_checkpointing false"
# all runs of grpo_trl.py in one process: loading TRL takes longer than they do
TOGETHER = """
import json, sys, traceback
sys.path.insert(0, "docs/tools")
import grpo_trl
for words in json.load(open("together.json")):
    try:
        grpo_trl.main(words)
    except Exception:
        traceback.print_exc()
"""
RELATIVE = 1e-5  # of what GRPO logs; of numbers below 0.1, of 0.1
NORM = 1e-4  # of grad_norm: torch adds the squares of a matrix in float32
NATS = 2e-5  # of a log-probability, after the training
NOT_ALIGN = {"step_time", "rewards/judge/mean", "rewards/judge/std", "total_flos"}
passed = failed = 0


def check(ok, text):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("%-4s  %s" % ("ok" if ok else "FAIL", text), flush=True)


def commands():
    """Every command line of the document's ```sh blocks."""
    inside, block = False, []
    document = open(os.path.join(ROOT, "docs/outgrow.md"), encoding="utf-8").read()
    for number, line in enumerate(document.split("\n"), 1):
        if line.startswith("```"):
            inside = line == "```sh"
        elif inside:
            block.append((number, line))
    return [command for _, command in split_commands(block)]


def flags(command):
    """{flag: [values]} of a command line."""
    found, name = {}, None
    for word in shlex.split(command):
        if word.startswith("--"):
            name = word
            found[name] = []
        elif name:
            found[name].append(word)
    return found


def run(command):
    p = subprocess.run(
        ["bash", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    if p.returncode:
        print("%s\n%s" % (command, p.stdout[-3000:]))
    return p.returncode == 0, p.stdout


def history(folder):
    """{step: entry} of trainer_state.json, evaluations in the same entry, or of stats_all.jsonl."""
    if os.path.exists(folder + "/stats_all.jsonl") and "ppo" in folder:
        return dict(enumerate(map(json.loads, open(folder + "/stats_all.jsonl")), 1))
    found, path = {}, folder + "/trainer_state.json"
    if not os.path.exists(path):
        states = glob.glob(folder + "/checkpoint-*/trainer_state.json")
        path = max(states, key=lambda p: int(p.split("-")[-1].split("/")[0]))
    for entry in json.load(open(path))["log_history"]:
        found.setdefault(entry["step"], {}).update(entry)
    return found


def weights(folder):
    """{name: floats} of model.safetensors, all F32, names without transformer."""
    data = open(folder + "/model.safetensors", "rb").read()
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    found = {}
    for name, tensor in header.items():
        if name not in ("__metadata__", "lm_head.weight"):
            begin, end = tensor["data_offsets"]
            found[name.replace("transformer.", "")] = array.array("f", numbers[begin:end])
    return found


def compare(name, ours, theirs, key, steps):
    """Rows of the hand-off table for one key."""
    ours, theirs = history(ours), history(theirs)
    differences = []
    for step in steps:
        a, b = (of.get(step, {}).get(key, math.nan) for of in (ours, theirs))
        print("| %s | %d | %.7f | %.7f | %.1e |" % (name, step, a, b, abs(a - b)))
        differences.append(math.inf if math.isnan(a - b) else abs(a - b))
    worst, count = max(differences, default=math.inf), len(differences)
    said = "%s: %s of %d steps, largest difference %.1e" % (name, key, count, worst)
    check(worst < LIMIT, said)


def same_weights(name, ours, theirs, before):
    """How far apart the weights are, beside how far the training moved them."""
    a, b, start = weights(ours), weights(theirs), weights(before)
    far = math.inf
    if a.keys() == b.keys():
        far = max((abs(x - y) for n in a for x, y in zip(a[n], b[n])), default=math.inf)
    moved = max(abs(x - y) for n in a if n in start for x, y in zip(a[n], start[n]))
    said = "%s: weights at most %.1e apart; the training moved them by up to %.1e"
    check(far < 0.05 * moved, said % (name, far, moved))


def same_flags(ours, theirs):
    a, b = flags(ours), flags(theirs)
    only = [f for f in a if f not in ALIGN_ONLY and a[f] != b.get(f)]
    only += [f for f in b if f not in TRL_ONLY and b[f] != a.get(f)]
    but = " but for " + " ".join(only) if only else ""
    line = " ".join(theirs.split()[:2])
    check(not only, "the flags of both lines are the same: %s%s" % (line, but))


def two_processes(opt, lines):
    ours = next(c for c in lines if c.startswith("./align sft")).replace("align_sft", "align_two")
    theirs = next(c for c in lines if c.startswith("trl/bin/trl sft")).replace("trl_sft", "trl_two")
    for word in ("--gradient_accumulation_steps 2", "--eval_strategy steps", "trl/bin/trl sft"):
        theirs = theirs.replace(word, "")
    scripts = os.path.join(os.path.abspath(opt.trl), "lib/python3*/site-packages/trl/scripts")
    (script,) = glob.glob(scripts + "/sft.py")
    launch = "trl/bin/python -m torch.distributed.run --nproc_per_node 2 %s %s" % (script, theirs)
    if run(ours)[0] and run(launch)[0]:
        compare("sft, 2 processes", "out/align_two", "out/trl_two", "loss", range(1, 9))
    else:
        check(False, "two processes")


def grpo_runs():
    """{name: (align's line, TRL's line)} of GRPO_RUNS."""
    runs = {}
    for number, (name, words) in enumerate(GRPO_RUNS.items()):
        rollouts, words = words.split(" ", 1)
        words = " %s --rollouts out/align_%s/rollouts.jsonl %s" % (GRPO, rollouts, words)
        ours = "./align grpo%s --output_dir out/align_run%d" % (words, number)
        theirs = "docs/tools/grpo_trl.py grpo%s%s" % (words, ON_CPU)
        runs[name] = ours, theirs + " --save_strategy no --output_dir out/trl_run%d" % number
    return runs


def run_together(commands):
    """Runs lines of grpo_trl.py in one process."""
    words = [shlex.split(c.partition("grpo_trl.py ")[2]) for c in commands]
    with open("together.json", "w") as f:
        json.dump(words, f)
    ok, printed = run("trl/bin/python -c %s" % shlex.quote(TOGETHER))
    if "Traceback" in printed:
        print(printed[printed.index("Traceback") :][:3000])
    return ok


def text_logprobs(folder):
    """Of the tokens of a few texts, by the model or the adapter in a folder."""
    model = "--model_name_or_path " + folder
    if os.path.exists(folder + "/adapter_config.json"):
        model = "--model_name_or_path out/language_model --peft_adapter " + folder
    _, printed = run("./align logprob %s --dataset_name out/texts/test.jsonl 2>/dev/null" % model)
    rows = [json.loads(line) for line in printed.strip().split("\n") if line.startswith("{")]
    return [x for row in rows for x in row["token_logprobs"]]


def same_logprobs(name, ours, theirs):
    a, b = text_logprobs(ours), text_logprobs(theirs)
    far = max((abs(x - y) for x, y in zip(a, b)), default=math.inf)
    said = "%s: after it, log-probabilities of %d tokens at most %.1e apart"
    check(len(a) == len(b) and far < NATS, said % (name, len(a), far))


def same_log(name, ours, theirs, leave_out=()):
    """Every number that TRL logs, with a row for the largest difference of each kind."""
    ours, theirs = history(ours), history(theirs)
    worst = {}
    for step, entry in theirs.items():
        for key in entry.keys() - NOT_ALIGN - set(leave_out):
            if key.startswith("train_"):
                continue  # of the run as a whole
            a, b = ours.get(step, {}).get(key), entry[key]
            difference = math.inf if a is None or b is None else abs(a - b) / max(abs(b), 0.1)
            worst[key] = max(worst.get(key, 0), difference)
    kinds = {"loss": 0, "kl": 0, "entropy": 0, "clip_ratio/": 0, "reward": 0, "completions/": 0}
    for key, difference in worst.items():
        kinds.update((k, max(kinds[k], difference)) for k in kinds if key.startswith(k))
    norm = worst.pop("grad_norm", math.inf)
    print("| %s | %s | %.1e |" % (name, " | ".join("%.1e" % d for d in kinds.values()), norm))
    wrong = {key: "%.1e" % d for key, d in worst.items() if not d < RELATIVE}
    check(
        len(theirs) and not wrong and norm < NORM,
        "%s: %d numbers at %d entries agree %s" % (name, len(worst) + 1, len(theirs), wrong or ""),
    )


def same_grpo(runs):
    print("| run | loss | kl | entropy | clip_ratio | reward | completions | grad_norm |")
    print("|---|---|---|---|---|---|---|---|")
    folders = {
        name: [flags(line)["--output_dir"][0] for line in lines] for name, lines in runs.items()
    }
    folders["docs/outgrow.md"] = ["out/align_grpo", "out/trl_grpo"]
    for name, (ours, theirs) in folders.items():
        # one that sampled counts its epochs in prompts that the other has not seen
        same_log(name, ours, theirs, {"epoch"} if ours == "out/align_grpo" else ())
    for name, (ours, theirs) in folders.items():
        same_logprobs(name, ours, theirs)


def same_reinforce():
    """TRL logs the loss of ratios that are 1, and the KL of a token: see docs/outgrow.md."""
    ours, theirs = "out/align_reinforce", "out/trl_reinforce"
    own = {"loss", "kl", "reward_std", "frac_reward_zero_std", "num_tokens"}
    own |= {key for entry in history(theirs).values() for key in entry if "clip_ratio" in key}
    own |= {"completions/m%s_length" % m for m in ("in", "ax")}
    own |= {"completions/m%s_terminated_length" % m for m in ("in", "ax", "ean")}
    same_log("reinforce", ours, theirs, own | {"completions/clipped_ratio"})
    same_logprobs("reinforce", ours, theirs)
    a, b = history(ours), history(theirs)
    steps = [step for step in b if "kl" in b[step]]
    far = max(abs(a[s]["kl"] - b[s]["kl"] * b[s]["completions/mean_length"]) for s in steps)
    check(far < LIMIT, "reinforce: kl is TRL's times the mean length, but for %.1e nats" % far)
    zero = max(abs(b[s]["loss"]) for s in steps)
    moves = any(abs(a[s]["loss"]) > 0.01 for s in steps)
    check(moves and zero < 1e-6, "reinforce: TRL's loss is 0 (%.1e): every ratio is 1" % zero)


def the_way_back(command):
    """Runs align on what TRL has trained; an evaluation gives what align's own model gives."""
    ok, printed = run(command)
    same = ""
    if ok and "eval" in command:
        # that samples answers: the two are compared on given texts
        if "--reward_model_path" in command:
            command = re.sub(r" --(ref_model|reward_model_path) \S+", "", command)
        there, here = (
            json.loads(run(c)[1].strip().split("\n")[-1])["eval_loss"]
            for c in (command, command.replace("out/trl_", "out/align_"))
        )
        ok = abs(there - here) < LIMIT
        same = ": eval_loss %.6f, of align's own model %.6f" % (there, here)
    check(ok, "the way back: %s%s" % (" ".join(command.split()[:4]), same))


def compare_all(opt):
    """Runs the document's commands, in the current folder, and compares what they leave."""
    lines = commands()
    ours = [c for c in lines if c.startswith("./align")]
    alone = [c for c in ours if "out/align_" in c and "out/trl_" not in c]
    first = [c for c in lines if c in alone or c.split()[0] in ("mkdir", "head", "sed")]
    trl = [c for c in lines if c.startswith(("trl/", "trl011/"))]
    several = ("pip", "--num_processes", "--accelerate_config")
    trl = [c for c in trl if not any(word in c for word in several)]
    for command in first:
        ok, _ = run(command)
        if not ok:
            check(False, command)
    runs = grpo_runs()
    for command in [GRPO_FAR] + [line for line, _ in runs.values()]:
        if not run(command)[0]:
            check(False, command)
    together = [c for c in trl if "grpo_trl.py" in c]
    apart = [c for c in trl if c not in together]
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run_together, together + [line for _, line in runs.values()])
        done = dict(zip(apart, pool.map(run, apart)))
    check(one.result(), "grpo_trl.py: %d runs in one process" % (len(together) + len(runs)))
    for command, (ok, _) in done.items():
        out = flags(command)["--output_dir"][0]
        check(ok, "%s ... --output_dir %s" % (" ".join(command.split()[:2]), out))
    for task in ("sft", "reward", "dpo", "ppo", "grpo", "reinforce"):
        align_line = [c for c in first if "out/align_" + task in c][0]
        same_flags(align_line, [c for c in trl if "out/trl_" + task in c][0])
    print("| run | step | align | TRL | difference |\n|---|---|---|---|---|")
    steps = range(1, 9)
    for task in ("sft", "reward", "dpo"):
        compare(task, "out/align_" + task, "out/trl_" + task, "loss", steps)
    compare("sft, eval_loss", "out/align_sft", "out/trl_sft", "eval_loss", (4, 8))
    compare("sft, resumed", "out/align_sft", "out/trl_resumed", "loss", steps[4:])
    for key in ("ppo/loss/total", "objective/kl"):
        compare("ppo, " + key, "out/align_ppo", "out/trl_ppo", key, steps)
    for key in ("loss", "kl"):
        compare("grpo, " + key, "out/align_grpo", "out/trl_grpo", key, steps)
    compare("reinforce", "out/align_reinforce", "out/trl_reinforce", "grad_norm", range(1, 5))
    same_grpo(runs)
    same_reinforce()
    if opt.processes:
        two_processes(opt, lines)
    starts = {"sft": "language_model", "reward": "reward_model", "dpo": "language_model"}
    starts["ppo"] = "ppo"
    for task, start in starts.items():
        same_weights(task, "out/align_" + task, "out/trl_" + task, "out/" + start)
    live = history("out/trl_grpo_live")
    finite = all(math.isfinite(live.get(step, {}).get("reward", math.nan)) for step in (1, 2))
    check(finite, "grpo_trl.py, live: 2 steps")
    live = history("out/trl_ppo_live")
    finite = all(math.isfinite(e["ppo/loss/total"]) for e in live.values())
    check(len(live) == 2 and finite, "ppo_trl.py, live: %d steps" % len(live))
    for command in ours:
        if "out/trl_" in command:
            the_way_back(command)


def main():
    parser = argparse.ArgumentParser(
        description="Compares align with TRL, by the commands of docs/outgrow.md."
    )
    parser.add_argument("--trl", required=True, metavar="DIR", help="environment with trl 1.16.0")
    parser.add_argument(
        "--trl011", required=True, metavar="DIR", help="environment with trl 0.11.4"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="models to use as out/ (default: made by %s)" % SHORT_RUN
    )
    parser.add_argument("--processes", action="store_true", help="a run of two processes as well")
    opt = parser.parse_args()
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        OMP_NUM_THREADS="1",
        PYTHONWARNINGS="ignore",
        TOKENIZERS_PARALLELISM="false",
    )
    links = [
        (os.path.abspath(opt.trl), "trl"),
        (os.path.abspath(opt.trl011), "trl011"),
        (ROOT + "/docs", "docs"),
        (ROOT + "/align", "align"),
    ]
    out, folder = opt.out and os.path.abspath(opt.out), tempfile.mkdtemp(prefix="check_outgrow.")
    os.environ["HF_HOME"] = folder + "/cache"
    os.chdir(folder)
    try:
        for source, name in links:
            os.symlink(source, name)
        if out:
            shutil.copytree(out, "out")
        elif not run(SHORT_RUN + " --quiet")[0]:
            sys.exit(1)
        compare_all(opt)
    finally:
        os.chdir("/")
        shutil.rmtree(folder)
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
