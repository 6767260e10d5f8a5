"""A long run: is memory flat, is speed flat?

    python3 docs/tools/long_run.py [MINUTES] [--threads 1]

Trains `ppo` on tiny shapes for so long (default 60), with checkpoints, and samples what the kernel
says of the process: resident memory, and processor time, since a busy machine slows the clock but
not that. Then one Ctrl-C, as a person would end it. A table of the run's tenths; the first, in
which arenas find their size, is shown but not judged.

The one thing that may grow is the log that trainer_state.json is written from: an entry each
--logging_steps, struct LogEntry, kept until the end. What it has grown by is shown beside the
memory. Fails where memory grew by a tenth more than that and 2 MB, or the later half makes 10 %
fewer steps per second of processor time than the earlier: a run that slows down does so more and
more, what else the machine does comes and goes. Needs ./align and Linux. Ends with 'N passed, N
failed'.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

LOGGING_STEPS, SPARE_MB, SPEED = 10, 2, 0.10

arguments = argparse.ArgumentParser()
arguments.add_argument("minutes", nargs="?", type=float, default=60)
arguments.add_argument("--threads", default="1")
arguments = arguments.parse_args()
root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
work = tempfile.mkdtemp()
with open(os.path.join(root, "align.c")) as file:
    metrics = int(re.search(r"MAX_METRICS = (\d+)", file.read())[1])
LOG_ENTRY = 8 + 24 * metrics  # bytes of struct LogEntry
os.environ["OMP_NUM_THREADS"] = arguments.threads


def align(command, out):
    return [os.path.join(root, "align"), *command.split(), "--output_dir", f"{work}/{out}"]


def prepare():
    rows = [json.loads(line) for line in open(os.path.join(root, "docs/reviews.jsonl"))][:400]
    with open(f"{work}/texts.jsonl", "w") as f:
        for row in rows:
            f.write(json.dumps({"text": row["text"], "score": row["score"]}) + "\n")
    data, base = f"--dataset_name {work}/texts.jsonl", f"--model_name_or_path {work}/lm"
    shape = "--n_layer 2 --n_head 2 --n_embd 64 --n_positions 64 --vocab_size 800"
    subprocess.run(align(f"pretrain {data} {shape} --max_steps 50 --quiet", "lm"), check=True)
    subprocess.run(align(f"reward {data} {base} --max_steps 20 --quiet", "rm"), check=True)
    batch = "--batch_size 8 --mini_batch_size 4 --learning_rate 1e-5 --max_steps 100000000"
    saved = f"--logging_steps {LOGGING_STEPS} --save_total_limit 2 --save_steps 50000"
    return f"ppo {base} --reward_model_path {work}/rm {data} {batch} {saved}"


def sample(pid):
    """Resident memory in MB: all of it, and what is no file's; seconds of processor time."""
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    with open(f"/proc/{pid}/stat") as file:
        stat = file.read().rsplit(")", 1)[1].split()
    seconds = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    return [int(status[k].split()[0]) / 1024 for k in ("VmRSS", "RssAnon")] + [seconds]


process = subprocess.Popen(align(prepare(), "ppo"), stderr=subprocess.PIPE, text=True)
said = {"step": 0, "last": ""}


def listen():
    for line in process.stderr:
        said["last"] = line.strip()
        found = re.search(r"step (\d+)/", line)
        if found:
            said["step"] = int(found[1])


listener = threading.Thread(target=listen)
listener.start()
begin, samples = time.time(), []
while process.poll() is None and time.time() - begin < arguments.minutes * 60:
    try:
        samples.append((time.time() - begin, said["step"], *sample(process.pid)))
    except (OSError, KeyError):
        break
    time.sleep(min(1, arguments.minutes / 10))
if process.poll() is None:
    process.send_signal(signal.SIGINT)
process.wait()
listener.join()
names = sorted(os.listdir(f"{work}/ppo"))
logs = [name for name in names if name.endswith((".jsonl", ".jsonl.tmp"))]
files = [f"{name} {os.path.getsize(f'{work}/ppo/{name}') / 2**20:.0f} MB" for name in logs]
left = [name for name in names if name.startswith(("checkpoint", "tmp"))]
shutil.rmtree(work)

print("minutes     steps   steps/s   steps/CPU s   RSS MB (least, most)   own MB   log MB")
speeds, own, log = [], [], []
tenth = samples[-1][0] / 10
for k in range(10):
    part = [s for s in samples if k * tenth <= s[0] <= (k + 1) * tenth]
    a, b = part[0], part[-1]
    speeds.append((b[1] - a[1]) / max(b[4] - a[4], 1e-9))
    own.append(max(s[3] for s in part))
    log.append(b[1] / LOGGING_STEPS * LOG_ENTRY / 2**20)
    rate, memory = (b[1] - a[1]) / (b[0] - a[0]), [s[2] for s in part]
    row = f"{b[0] / 60:7.1f}{b[1]:10d}{rate:10.1f}{speeds[k]:14.1f}"
    row += f"{min(memory):14.1f}{max(memory):9.1f}{own[k]:9.1f}{log[k]:9.1f}"
    print(row)
print("ended by:", said["last"][:120], "|", ", ".join(files), "|", " ".join(left))

passed = failed = 0


def check(good, what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print("ok   " if good else "FAIL ", what)


grown, logged = own[9] - own[1], log[9] - log[1]
early, late = statistics.mean(speeds[1:5]), statistics.mean(speeds[6:])
check(
    grown < 1.1 * logged + SPARE_MB,
    f"memory: {grown:+.1f} MB from the second tenth to the last, of which the log {logged:.1f} MB",
)
check(
    late / early > 1 - SPEED,
    f"speed: {early:.1f} steps/CPU s in tenths 2 to 5, {late:.1f} in 7 to 10"
    f" ({100 * (late / early - 1):+.1f} %);"
    f" tenths from {min(speeds[1:]):.1f} to {max(speeds[1:]):.1f}",
)
told = "--resume_from_checkpoint true goes on" in said["last"]
check(told and process.returncode == 1, "Ctrl-C: saved, and said how to go on")
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
