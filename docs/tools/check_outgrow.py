#!/usr/bin/env python3
"""check_outgrow.py -- runs the commands of docs/outgrow.md with align and with TRL and compares what they log.

    python3 docs/tools/check_outgrow.py --trl /tmp/new --trl011 /tmp/old [--out out] [--processes]

--trl and --trl011: the two environments that docs/outgrow.md installs; --out: models of `make run` (default: a
shortened one is made). Prints the hand-off table, a row a step, and checks that each trl line has the flags of its
align line. --processes: a run of two processes as well. Exit 0: all passed. Ends with 'N passed, N failed'.
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

LIMIT = 1e-4                                   # of a loss or KL in nats
ALIGN_ONLY = {"--output_dir", "--eval_dataset", "--reward_model_path", "--dataset_name"}      # the last two: of ppo
TRL_ONLY = {"--output_dir", "--eval_strategy", "--per_device_eval_batch_size", "--use_cpu", "--bf16", "--rollouts"}
passed = failed = 0


def check(ok, text):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print("%-4s  %s" % ("ok" if ok else "FAIL", text), flush=True)


def commands():
    """Every command line of the document's ```sh blocks."""
    inside, block = False, []
    for number, line in enumerate(open(os.path.join(ROOT, "docs/outgrow.md"), encoding="utf-8").read().split("\n"), 1):
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
    p = subprocess.run(["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    if p.returncode:
        print("%s\n%s" % (command, p.stdout[-3000:]))
    return p.returncode == 0, p.stdout


def history(folder):
    """{step: entry} of trainer_state.json, evaluations in the same entry, or of stats_all.jsonl."""
    if os.path.exists(folder + "/stats_all.jsonl"):
        return dict(enumerate(map(json.loads, open(folder + "/stats_all.jsonl")), 1))
    found = {}
    newest = sorted(glob.glob(folder + "/checkpoint-*/trainer_state.json"), key=lambda p: int(p.split("-")[-1].split("/")[0]))
    path = folder + "/trainer_state.json" if os.path.exists(folder + "/trainer_state.json") else newest[-1]
    for entry in json.load(open(path))["log_history"]:
        found.setdefault(entry["step"], {}).update(entry)
    return found


def weights(folder):
    """{name: floats} of model.safetensors, all F32, names without transformer."""
    data = open(folder + "/model.safetensors", "rb").read()
    length, = struct.unpack("<Q", data[:8])
    tensors = {name: t for name, t in json.loads(data[8:8 + length]).items() if name != "__metadata__"}
    return {name.replace("transformer.", ""): array.array("f", data[8 + length + t["data_offsets"][0]:8 + length + t["data_offsets"][1]])
            for name, t in tensors.items() if name != "lm_head.weight"}


def compare(name, ours, theirs, key, steps):
    """Rows of the hand-off table for one key."""
    ours, theirs = history(ours), history(theirs)
    pairs = [(step, ours.get(step, {}).get(key, math.nan), theirs.get(step, {}).get(key, math.nan)) for step in steps]
    for step, a, b in pairs:
        print("| %s | %d | %.7f | %.7f | %.1e |" % (name, step, a, b, abs(a - b)))
    worst = max((abs(a - b) if not math.isnan(a - b) else math.inf for _, a, b in pairs), default=math.inf)
    check(worst < LIMIT, "%s: %s of %d steps, largest difference %.1e" % (name, key, len(pairs), worst))


def same_weights(name, ours, theirs, before):
    """How far apart the weights are, beside how far the training moved them."""
    a, b, start = weights(ours), weights(theirs), weights(before)
    far = max((abs(x - y) for n in a for x, y in zip(a[n], b[n])), default=math.inf) if a.keys() == b.keys() else math.inf
    moved = max(abs(x - y) for n in a if n in start for x, y in zip(a[n], start[n]))
    check(far < 0.05 * moved, "%s: weights at most %.1e apart; the training moved them by up to %.1e" % (name, far, moved))


def same_flags(ours, theirs):
    a, b = flags(ours), flags(theirs)
    only = [f for f in a if f not in ALIGN_ONLY and a[f] != b.get(f)] + [f for f in b if f not in TRL_ONLY and b[f] != a.get(f)]
    check(not only, "the flags of both lines are the same: %s%s" % (" ".join(theirs.split()[:2]), " but for " + " ".join(only) if only else ""))


def two_processes(opt, lines):
    ours = next(c for c in lines if c.startswith("./align sft")).replace("align_sft", "align_two")
    theirs = next(c for c in lines if c.startswith("trl/bin/trl sft")).replace("trl_sft", "trl_two")
    theirs = theirs.replace("--gradient_accumulation_steps 2", "").replace("--eval_strategy steps", "").replace("trl/bin/trl sft", "")
    script, = glob.glob(os.path.join(os.path.abspath(opt.trl), "lib/python3*/site-packages/trl/scripts/sft.py"))
    if run(ours)[0] and run("trl/bin/python -m torch.distributed.run --nproc_per_node 2 %s %s" % (script, theirs))[0]:
        compare("sft, 2 processes", "out/align_two", "out/trl_two", "loss", range(1, 9))
    else:
        check(False, "two processes")


def main():
    parser = argparse.ArgumentParser(description="Compares align with TRL, by the commands of docs/outgrow.md.")
    parser.add_argument("--trl", required=True, metavar="DIR", help="environment with trl 1.16.0")
    parser.add_argument("--trl011", required=True, metavar="DIR", help="environment with trl 0.11.4")
    parser.add_argument("--out", metavar="DIR", help="models to use as out/ (default: made by %s)" % SHORT_RUN)
    parser.add_argument("--processes", action="store_true", help="a run of two processes as well")
    opt = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", TOKENIZERS_PARALLELISM="false")
    links = [(os.path.abspath(opt.trl), "trl"), (os.path.abspath(opt.trl011), "trl011"), (ROOT + "/docs", "docs"), (ROOT + "/align", "align")]
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
        lines = commands()
        first = [c for c in lines if c.split()[0] in ("mkdir", "head", "sed") or (c.startswith("./align") and "out/align_" in c and "out/trl_" not in c)]
        trl = [c for c in lines if c.startswith(("trl/", "trl011/")) and "pip" not in c and "--num_processes" not in c and "--accelerate_config" not in c]
        back = [c for c in lines if c.startswith("./align") and "out/trl_" in c]
        for command in first:
            ok, _ = run(command)
            if not ok:
                check(False, command)
        with ThreadPoolExecutor(2) as pool:
            done = dict(zip(trl, pool.map(run, trl)))
        for command, (ok, _) in done.items():
            check(ok, "%s ... --output_dir %s" % (" ".join(command.split()[:2]), flags(command)["--output_dir"][0]))
        for task in ("sft", "reward", "dpo", "ppo"):
            ours, theirs = ([c for c in list_ if "out/%s_%s" % (who, task) in c][0] for who, list_ in (("align", first), ("trl", trl)))
            same_flags(ours, theirs)
        print("| run | step | align | TRL | difference |\n|---|---|---|---|---|")
        for task in ("sft", "reward", "dpo"):
            compare(task, "out/align_" + task, "out/trl_" + task, "loss", range(1, 9))
        compare("sft, eval_loss", "out/align_sft", "out/trl_sft", "eval_loss", (4, 8))
        compare("sft, resumed", "out/align_sft", "out/trl_resumed", "loss", range(5, 9))
        compare("ppo, ppo/loss/total", "out/align_ppo", "out/trl_ppo", "ppo/loss/total", range(1, 9))
        compare("ppo, objective/kl", "out/align_ppo", "out/trl_ppo", "objective/kl", range(1, 9))
        if opt.processes:
            two_processes(opt, lines)
        for task, start in (("sft", "language_model"), ("reward", "reward_model"), ("dpo", "language_model"), ("ppo", "ppo")):
            same_weights(task, "out/align_" + task, "out/trl_" + task, "out/" + start)
        live = history("out/trl_ppo_live")
        check(len(live) == 2 and all(map(math.isfinite, (e["ppo/loss/total"] for e in live.values()))), "ppo_trl.py, live: %d steps" % len(live))
        for command in back:
            ok, printed = run(command)
            same = ""
            if ok and "eval" in command:       # what align's own model gives
                if "--reward_model_path" in command:     # that samples answers: the two are compared on given texts
                    command = re.sub(r" --(ref_model|reward_model_path) \S+", "", command)
                there, here = (json.loads(run(c)[1].strip().split("\n")[-1])["eval_loss"] for c in (command, command.replace("out/trl_", "out/align_")))
                ok, same = abs(there - here) < LIMIT, ": eval_loss %.6f, of align's own model %.6f" % (there, here)
            check(ok, "the way back: %s%s" % (" ".join(command.split()[:4]), same))
    finally:
        os.chdir("/")
        shutil.rmtree(folder)
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
