"""The same bits whatever the number of threads.

    python3 docs/tools/check_threads.py

Runs `rlhf` with shortened stages, and each trainer with and without LoRA, on 1, 2, 3 and 7 threads,
and compares SHA-256 of the weights that each leaves. Shapes are small, but above the sizes from
which loops are shared out (the environment OMP_DYNAMIC=false makes the runtime take as many threads
as asked for, also on fewer processors). Needs ./align, built with OpenMP. A table, then 'N passed,
N failed'.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

THREADS = (1, 2, 3, 7)
root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
work = tempfile.mkdtemp()


def align(command, out, threads):
    # 7 threads that wait must not take turns with those that work
    spin = {"GOMP_SPINCOUNT": "0", "OMP_DYNAMIC": "false"}
    ran = subprocess.run(
        [os.path.join(root, "align"), *command.split(), "--output_dir", out, "--quiet"],
        env=os.environ | spin | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if ran.returncode:
        sys.exit(f"align {command}\n{ran.stderr}")


def weights(folder):
    """Of all *.safetensors below a folder, names and contents."""
    sums = hashlib.sha256()
    found = 0
    for path, _, names in sorted(os.walk(folder)):
        for name in sorted(n for n in names if n.endswith(".safetensors")):
            found += 1
            file = os.path.join(path, name)
            sums.update(os.path.relpath(file, folder).encode() + open(file, "rb").read())
    assert found, folder
    return sums.hexdigest()


def write_rows(name, rows):
    with open(f"{work}/{name}", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


rows = [json.loads(line) for line in open(os.path.join(root, "docs/reviews.jsonl"))][:300]
write_rows("texts.jsonl", [{"text": row["text"], "score": row["score"]} for row in rows])
answers = [(" " + a["text"], " " + b["text"]) for a, b in zip(rows[::2], rows[1::2])]
write_rows("pairs.jsonl", [{"prompt": "The film", "chosen": a, "rejected": b} for a, b in answers])
shape = "--n_layer 2 --n_head 4 --n_embd 64 --n_positions 64 --vocab_size 1000"
base, texts = f"--model_name_or_path {work}/lm", f"--dataset_name {work}/texts.jsonl"
pairs = f"--dataset_name {work}/pairs.jsonl"
align(f"pretrain {shape} {texts} --max_steps 20", f"{work}/lm", 1)
align(f"reward {base} {texts} --max_steps 5", f"{work}/rm", 1)
few = "--max_steps 8 --learning_rate 1e-3"
lora = "--use_peft --lora_r 4 --lora_target_modules all-linear"
rolls = f"{base} {texts} --reward_model_path {work}/rm --max_steps 4 --learning_rate 1e-3"
rolls += " --batch_size 16"
trainers = {
    "pretrain": f"pretrain {shape} {texts} {few}",
    "sft": f"sft {base} {texts} {few}",
    "reward": f"reward {base} {texts} {few}",
    "ppo": f"ppo {rolls} --mini_batch_size 8",
    "reinforce": f"reinforce {rolls}",
    "dpo": f"dpo {base} {pairs} {few}",
}
commands = {"rlhf": "rlhf --pretrain_steps 20 --reward_steps 8 --ppo_steps 2 --dpo_steps 4"}
commands |= trainers
for name, command in trainers.items():
    if name != "pretrain":
        commands[f"{name}, LoRA"] = f"{command} {lora}"

print(f"{'SHA-256 of the weights':24}" + "".join(f"{t} thread{'s'[:t > 1]:10}" for t in THREADS))
passed = 0
for name, command in commands.items():
    begin, sums = time.time(), []
    for threads in THREADS:
        align(command, f"{work}/out", threads)
        sums.append(weights(f"{work}/out"))
        shutil.rmtree(f"{work}/out")
    passed += len(set(sums)) == 1
    shown = "".join(f"{s[:12]}{'  ' if s == sums[0] else ' !'}    " for s in sums)
    print(f"{name:24}{shown}{time.time() - begin:6.1f} s", flush=True)
shutil.rmtree(work)
print(f"{passed} passed, {len(commands) - passed} failed")
sys.exit(passed != len(commands))
