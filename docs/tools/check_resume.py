"""Kills runs at random moments and resumes them: nothing may be lost, nothing may differ.

    python3 docs/tools/check_resume.py [--kills 50] [--seed 1]

For each trainer, with and without LoRA, one run is left alone. Others, with the same flags, are
killed (SIGKILL) at random moments, some of them several times, then resumed from the newest
checkpoint until they end. Every folder checkpoint-N that a killed run leaves must load, and the
final weights, logs and rollouts must equal, byte for byte, those of the run that was left alone,
but for what a clock says. The course (rlhf) is killed once in each of its stages. Needs ./align.
Ends with 'N passed, N failed'.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

CLOCK = ("runtime", "per_second", "time/")

arguments = argparse.ArgumentParser()
arguments.add_argument("--kills", type=int, default=50)
arguments.add_argument("--seed", type=int, default=1)
arguments = arguments.parse_args()
root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
work = tempfile.mkdtemp()
draw = random.Random(arguments.seed)
lora = "--use_peft --lora_r 4"


def align(command, out, *more):
    return [os.path.join(root, "align"), *command.split(), "--output_dir", out, "--quiet", *more]


def tells_time(key):
    return any(word in key for word in CLOCK)


def without_clock(value):
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not tells_time(k)}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def read(*path):
    with open(os.path.join(*path), "rb") as file:
        return file.read()


def reviews():
    return [json.loads(line) for line in read(root, "docs/reviews.jsonl").splitlines()]


def write_rows(name, rows):
    with open(f"{work}/{name}", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def contents(folder):
    """What a run left behind, by file; logs without what a clock says."""
    found = {}
    for name in sorted(os.listdir(folder)):
        # the report tells the time and the command line
        if os.path.isdir(os.path.join(folder, name)) or name.startswith("report."):
            continue
        data = read(folder, name)
        if name == "trainer_state.json":
            data = without_clock(json.loads(data))
        if name == "stats_all.jsonl":
            data = [without_clock(json.loads(line)) for line in data.splitlines()]
        found[name] = data
    return found


def checkpoints(folder):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if name.startswith("checkpoint-")]
    return sorted(names, key=lambda name: int(name.split("-")[1]))


def whole(folder, files):
    """Asserts that a checkpoint has the files that it should have.

    Every safetensors file is as long as its header says, every JSON file is JSON.
    """
    assert sorted(os.listdir(folder)) == files, (folder, sorted(os.listdir(folder)))
    for name in files:
        data = read(folder, name)
        if name.endswith(".json"):
            json.loads(data)
        if name.endswith(".safetensors"):
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            ends = [t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"]
            assert len(data) == 8 + length + max(ends), name


def prepare():
    """A small language model and reward model, and preferences; {name: command} of the trainers."""
    rows = reviews()[:400]
    write_rows("texts.jsonl", [{"text": row["text"], "score": row["score"]} for row in rows])
    pairs = [(" " + a["text"], " " + b["text"]) for a, b in zip(rows[::2], rows[1::2])]
    write_rows(
        "pairs.jsonl", [{"prompt": "The film", "chosen": a, "rejected": b} for a, b in pairs]
    )
    base, data = f"--model_name_or_path {work}/lm", f"{work}/texts.jsonl"
    texts, pairs = f"--dataset_name {data}", f"--dataset_name {work}/pairs.jsonl"
    shape = "--n_layer 2 --n_head 2 --n_embd 32 --n_positions 64 --vocab_size 800"
    subprocess.run(align(f"pretrain {shape} {texts} --max_steps 20", f"{work}/lm"), check=True)
    subprocess.run(align(f"reward {base} {texts} --max_steps 10", f"{work}/rm"), check=True)
    small = "--per_device_train_batch_size 4 --logging_steps 3 --max_steps 120 --save_steps 7"
    small += " --learning_rate 1e-3"
    rolls = f"{base} {texts} --reward_model_path {work}/rm --max_steps 40 --save_steps 3"
    rolls += " --logging_steps 2 --learning_rate 1e-3 --batch_size 8"
    evaluated = f"--eval_dataset {data} --eval_steps 50"
    return {
        "pretrain": f"pretrain {shape} {texts} {small} --max_length 32",
        "sft": f"sft {base} {texts} {evaluated} {small} --save_total_limit 2",
        "reward": f"reward {base} {texts} {small}",
        "dpo": f"dpo {base} {pairs} {small} --gradient_accumulation_steps 2",
        "ppo": f"ppo {rolls} --mini_batch_size 4 --use_score_scaling --use_score_norm",
        "reinforce": f"reinforce {rolls} --baseline mean",
        "sft, LoRA": f"sft {base} {texts} {small} {lora}",
        "reward, LoRA": f"reward {base} {pairs} {small} {lora}",
        "dpo, LoRA": f"dpo {base} {pairs} {small} {lora}",
        "ppo, LoRA": f"ppo {rolls} --mini_batch_size 4 {lora}",
        "reinforce, LoRA": f"reinforce {rolls} {lora}",
    }


def resumed(command, out, expected):
    """Resumes until the end; how that went, as a word."""
    places = checkpoints(out)
    process = align(command, out, "--resume_from_checkpoint", "true")
    done = subprocess.run(process, capture_output=True, text=True)
    if done.returncode:
        return f"resuming failed: {done.stderr.strip()}"
    found = contents(out)
    different = [f for f in set(expected) | set(found) if expected.get(f) != found.get(f)]
    if different:
        return f"differs after resuming from {places[-1:]}: {sorted(different)}"
    if any(n.startswith("tmp-") for n in os.listdir(out)):
        return "a tmp- folder is left"
    if not places:
        return "resumed from the beginning"
    return f"resumed with {len(places)} checkpoints, the last {places[-1]}"


def killed_run(command, seconds, expected, files):
    """Kills a run one to three times, resumes it, compares; how often it was killed, and a word."""
    out, kills = f"{work}/killed", 0
    shutil.rmtree(out, ignore_errors=True)
    run = align(command, out, "--resume_from_checkpoint", "true")
    for attempt in range(draw.choice([1, 1, 2, 3])):
        process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.05, 1.0) * seconds)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in checkpoints(out):
            whole(os.path.join(out, folder), files)
    return kills, resumed(command, out, expected)


def interrupted_run(command, seconds, expected, files):
    """Ctrl-C once: the step is finished and saved, the message says how to go on.

    Twice: it stops at once.
    """
    out = f"{work}/interrupted"
    shutil.rmtree(out, ignore_errors=True)
    run = align(command, out, "--resume_from_checkpoint", "true")
    for times in (1, 2):
        before = set(checkpoints(out))
        process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
        while set(checkpoints(out)) <= before and process.poll() is None:
            time.sleep(0.002)  # until it trains
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        message = process.communicate()[1].strip().split("\n")[-1]
        for folder in checkpoints(out):
            whole(os.path.join(out, folder), files)
        said = "interrupted after step" in message and "--resume_from_checkpoint true" in message
        if times == 1 and not (process.returncode == 1 and said):
            return f"Ctrl-C: exit {process.returncode}: {message}"
        if times == 2 and process.returncode not in (1, -signal.SIGINT):
            return f"Ctrl-C twice: exit {process.returncode}: {message}"
    return resumed(command, out, expected)


def started_over(command, seconds, expected, files):
    """A run with another seed leaves checkpoints; one starts over in its folder and is killed.

    The newest checkpoints are its own.
    """
    out = f"{work}/over"

    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(align(command, out, "--seed", "7"), check=True)
    first = f"{out}/{checkpoints(out)[0]}/optimizer.safetensors"
    before = os.path.getmtime(first)

    def is_replaced():
        try:
            return os.path.getmtime(first) != before
        except FileNotFoundError:  # between the renames of the old folder and of the new one
            return False

    process = subprocess.Popen(align(command, out), stderr=subprocess.DEVNULL)
    while process.poll() is None and not is_replaced():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return resumed(command, out, expected)


def complete(command, out):
    """A run goes on where no step is left, at the step of its last checkpoint or before.

    It says so, and has that checkpoint's weights, and figures that fit.
    """
    last = checkpoints(out)[-1]
    steps = int(last.split("-")[1])
    weights = [f for f in os.listdir(f"{out}/{last}") if "model.safetensors" in f]
    log = json.loads(read(out, last, "trainer_state.json"))["log_history"]
    losses = [e["loss"] for e in log if "loss" in e]
    for most in (steps, 3):
        more = ["--resume_from_checkpoint", "true", "--max_steps", str(most)]
        done = subprocess.run(align(command, out, *more), capture_output=True, text=True)
        notes = [line for line in done.stderr.split("\n") if "no step is left to train" in line]
        expected = f"{last} is at step {steps}, the run has {most}: "
        if done.returncode or len(notes) != 1 or expected not in notes[0]:
            return f"max_steps {most}: {done.stderr}"
        state = json.loads(read(out, "trainer_state.json"))
        at, of = state["global_step"], state["max_steps"]
        if (at, of) != (steps, steps):
            return f"max_steps {most}: global_step {at}, max_steps {of}"
        if without_clock(state["log_history"][: len(log)]) != without_clock(log):
            return "the log differs"
        for end in state["log_history"][len(log) :]:
            if "train_loss" not in end:
                continue
            least, loss, largest = min(losses), end["train_loss"], max(losses)
            if not least < loss < largest:
                return f"train_loss {loss}, steps' losses from {least} to {largest}"
            if abs(end["train_steps_per_second"] * end["train_runtime"] / steps - 1) > 1e-6:
                return "steps a second"
        for name in weights:
            if read(out, name) != read(out, last, name):
                return f"{name} is not the checkpoint's"
    return "resumed where it is complete"


def copied(command, out):
    """A folder whose files were copied one by one, the newest first; a run over it with a limit.

    The files have the times of the copying.
    """
    copy = f"{work}/copy"
    shutil.rmtree(copy, ignore_errors=True)
    os.mkdir(copy)
    names = checkpoints(out)[-3:]
    for k, name in enumerate(reversed(names)):
        shutil.copytree(f"{out}/{name}", f"{copy}/{name}")
        for folder, _, files in os.walk(f"{copy}/{name}"):
            for f in files:
                os.utime(os.path.join(folder, f), (1000 + k, 1000 + k))
    last = int(names[-1].split("-")[1])
    more = f"--resume_from_checkpoint true --max_steps {last + 1} --save_steps 1"
    process = align(command, copy, *more.split(), "--save_total_limit", "2")
    process.remove("--quiet")
    done = subprocess.run(process, capture_output=True, text=True)
    if f"going on after step {last} from" not in done.stderr:
        return f"copied: {done.stderr}"
    left = checkpoints(copy)
    if left != [names[-1], f"checkpoint-{last + 1}"]:
        return f"left: {left}"
    return "resumed from the newest of copies"


def interrupted_evaluation():
    """Ctrl-C in the evaluation after the last step: it is cut short, the weights are saved, exit 1.

    Twice: it stops at once.
    """
    write_rows("held_out.jsonl", [{"text": row["text"]} for row in reviews()])
    command = f"sft --model_name_or_path {work}/lm --dataset_name {work}/texts.jsonl"
    command += f" --max_steps 2 --save_steps 2 --max_length 64 --eval_dataset {work}/held_out.jsonl"
    command += " --per_device_eval_batch_size 1"
    for tries in range(40):  # the second one must come before the model is saved: a few tries,
        times = 1 if tries == 0 else 2
        pause = 0.0005 * (tries % 10 + 1)  # soon after the first, yet not so soon that they are one
        out = f"{work}/evaluation{times}"
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(align(command, out), stderr=subprocess.PIPE, text=True)
        while not os.path.exists(f"{out}/checkpoint-2") and process.poll() is None:
            time.sleep(0.002)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        message = process.communicate()[1].strip().split("\n")[-1]
        files = ("model.safetensors", "trainer_state.json")
        saved = all(os.path.exists(f"{out}/{name}") for name in files)
        if times == 2 and process.returncode == -signal.SIGINT:
            if not saved:
                return "ended early and saved; twice: ended at once"
            continue  # it came between the saving and the end
        said = f"interrupted after the last step; the model is saved in {out}" in message
        if process.returncode != 1 or not saved or not said:
            return f"exit {process.returncode}: {message}"
        log = json.loads(read(out, "trainer_state.json"))["log_history"]
        if any("eval_loss" in entry for entry in log):
            return "a part of the evaluation is logged"
    return "the second Ctrl-C did not end it"


def killed_course():
    """rlhf, killed in each of its stages as soon as that has a checkpoint, then to its end.

    The models and the results are those of a course that was left alone.
    """
    command = f"rlhf --model_name_or_path {work}/lm --dataset_name {work}/texts.jsonl"
    command += " --pretrain_steps 30 --reward_steps 20 --ppo_steps 10 --dpo_steps 20"
    command += " --resume_from_checkpoint true"
    stages = ["language_model", "reward_model", "ppo", "dpo"]
    alone, out, kills = f"{work}/course", f"{work}/killed_course", 0
    subprocess.run(align(command, alone), check=True, capture_output=True)
    for stage in stages:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(align(command, out), **silent)
        while process.poll() is None and not checkpoints(f"{out}/{stage}"):
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    if kills < len(stages):
        return kills, f"killed {kills} times: a stage ended before its kill"
    done = subprocess.run(align(command, out), capture_output=True, text=True)
    if done.returncode:
        return kills, f"resuming failed: {done.stderr.strip()}"
    for stage in stages:
        if contents(f"{out}/{stage}") != contents(f"{alone}/{stage}"):
            return kills, f"{stage} differs"
    machine = {"seconds": 0, "peak_rss_bytes": 0}
    results = [json.loads(read(folder, "summary.json")) | machine for folder in (out, alone)]
    if results[0] != results[1]:
        return kills, f"summary.json: {results}"
    return kills, "resumed in each stage, with the same models, logs and results"


passed = failed = total = 0


def judge(name, word, kills=0):
    global passed, failed, total
    good = word.startswith(("resumed", "ended"))
    total, passed, failed = total + kills, passed + good, failed + (not good)
    print(f"{'ok  ' if good else 'FAIL'}  {name}: {word}", flush=True)


os.environ["OMP_NUM_THREADS"] = "1"
runs = {}
for name, command in prepare().items():
    begin = time.time()
    subprocess.run(align(command, f"{work}/alone"), check=True)
    files = sorted(os.listdir(f"{work}/alone/{checkpoints(f'{work}/alone')[0]}"))
    runs[name] = (command, time.time() - begin, contents(f"{work}/alone"), files)
    judge(f"{name}, complete", complete(command, f"{work}/alone"))
    judge(f"{name}, copied", copied(command, f"{work}/alone"))
    shutil.rmtree(f"{work}/alone")
judge("sft, Ctrl-C in the last evaluation", interrupted_evaluation())
for name in ("sft", "ppo, LoRA"):
    judge(f"{name}, Ctrl-C", interrupted_run(*runs[name]))
judge("ppo, started over", started_over(*runs["ppo"]))
kills, word = killed_course()
judge("rlhf, killed in each stage", word, kills)
while total < arguments.kills:
    for name, run in runs.items():
        if total >= arguments.kills:
            break
        kills, word = killed_run(*run)
        judge(f"{name} ({run[1]:.1f} s), killed {kills} times", word, kills)
shutil.rmtree(work)
print(f"{total} kills")
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
