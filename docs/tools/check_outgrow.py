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
# of ppo
ALIGN_ONLY = {"--output_dir", "--eval_dataset"} | {"--reward_model_path", "--dataset_name"}
TRL_ONLY = {"--output_dir", "--eval_strategy", "--per_device_eval_batch_size"}
TRL_ONLY |= {"--use_cpu", "--bf16", "--rollouts"}
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
    if os.path.exists(folder + "/stats_all.jsonl"):
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
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(trl, pool.map(run, trl)))
    for command, (ok, _) in done.items():
        out = flags(command)["--output_dir"][0]
        check(ok, "%s ... --output_dir %s" % (" ".join(command.split()[:2]), out))
    for task in ("sft", "reward", "dpo", "ppo"):
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
    if opt.processes:
        two_processes(opt, lines)
    starts = {"sft": "language_model", "reward": "reward_model", "dpo": "language_model"}
    starts["ppo"] = "ppo"
    for task, start in starts.items():
        same_weights(task, "out/align_" + task, "out/trl_" + task, "out/" + start)
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
