"""What goes wrong, and what align says then.

    python3 docs/tools/check_failures.py [--table] [--align ./align] [WORD ...]

Runs align on the wrong files, flags and numbers below, and on full and broken disks. Each case
states the exit status (0 done, 1 it could not be done, 2 wrong usage) and words of the message: of
the last line on stderr, which must be the only one that is an error; where the status is 0, of all
that was said. Makes its tiny models with align itself. With words only the cases whose description
has one of them. --table prints the cases and messages in Markdown. Ends with 'N passed, N failed'.
"""

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
arguments = argparse.ArgumentParser()
arguments.add_argument("--table", action="store_true")
arguments.add_argument("--align", default=os.path.join(ROOT, "align"))
arguments.add_argument("words", nargs="*")
arguments = arguments.parse_args()
program = os.path.realpath(arguments.align)
# in memory: thousands of small files are put on the disk one by one
work = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
os.chdir(work)
# GOMP_SPINCOUNT: else align starts itself again
environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
passed = failed = 0


def align(command, **how):
    usual = dict(stdin=subprocess.DEVNULL, capture_output=True, timeout=60, env=environment)
    return subprocess.run([program] + shlex.split(command), **{**usual, **how})


def result(what, problem, message=""):
    """Counts a case and prints it."""
    global passed, failed
    if problem:
        failed += 1
        print("FAILED %s: %s" % (what, problem))
    else:
        passed += 1
        if arguments.table:
            message = message.replace(os.path.dirname(program) + "/", "")
            message = message.replace("|", "\\|").replace("<", "&lt;")
            print("| %s | %s |" % (what.replace("|", "\\|"), message))


def last_line(process):
    return (process.stderr.decode("utf-8", "replace").strip().split("\n") or [""])[-1]


def outcome(good, seen):
    """What result() takes: None, or what was seen in its place."""
    return None if good else seen


def problem_of(process, status, words):
    said = process.stderr.decode("utf-8", "replace")
    errors = [line for line in said.split("\n") if line.startswith("align: ")]
    errors = [line for line in errors if not line.startswith("align: note: ")]
    looked_at = last_line(process) if status else said + process.stdout.decode("utf-8", "replace")
    if process.returncode != status:
        return "exit status %d, %d was expected; %s" % (process.returncode, status, said[-300:])
    if status and (len(errors) != 1 or last_line(process) != errors[0]):
        return "one line was expected last on stderr: " + said[-300:]
    missing = [word for word in words if word not in looked_at]
    return "the message lacks %s: %s" % (missing, looked_at[-400:]) if missing else None


def wanted(what):
    return not arguments.words or any(word in what for word in arguments.words)


def case(what, command, status, *words):
    """command: one, or a list of them of which each must end so."""
    for each in command if isinstance(command, list) else [command]:
        if not wanted(what):
            continue
        shutil.rmtree("out", ignore_errors=True)
        process = align(each)
        said = last_line(process).replace("align: ", "", 1)
        shown = what
        if isinstance(command, list):
            base = next((base for base in bases if each.startswith(base)), None)
            line = base.split()[0] + " ... " + each[len(base) :] if base else each
            line = re.sub(r"(\w+ )\1{3,}", r"\1... ", re.sub(" +", " ", line))
            shown = "%s: `%s`" % (what, line)
        problem = problem_of(process, status, words)
        result(shown, problem, said if status or words else "accepted")


def write(name, data):
    if os.path.dirname(name):
        os.makedirs(os.path.dirname(name), exist_ok=True)
    with open(name, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())


def lines(name, *rows):
    write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(name):
    with open(name, "rb") as file:
        return file.read()


def model(name, change=None, config=None, base="m"):
    """A copy of a model.

    change(header, numbers) works on its safetensors, config on its config.json.
    """
    shutil.copytree(base, name)
    if config:
        config = {**json.loads(read(base + "/config.json")), **config}
        write(name + "/config.json", json.dumps(config))
    if change:
        data = read(base + "/model.safetensors")
        length = struct.unpack("<Q", data[:8])[0]
        header, numbers = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
        change(header, numbers)
        text = json.dumps(header).encode()
        write(name + "/model.safetensors", struct.pack("<Q", len(text)) + text + numbers)


def plant(name, place, value):
    """A change of a tensor: its number at this place."""

    def change(header, numbers):
        begin = header["transformer." + name]["data_offsets"][0]
        struct.pack_into("<f", numbers, begin + 4 * place, value)

    return change


def add(name, shape, value):
    """A further tensor, all of whose numbers are `value`; or the numbers of one of that name."""

    def change(header, numbers):
        begin, n = len(numbers), shape[0] * (shape[1] if len(shape) > 1 else 1)
        if isinstance(value, str):
            first, last = header[value]["data_offsets"]
            numbers.extend(numbers[first:last])
        else:
            numbers.extend(struct.pack("<f", value) * n)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(numbers)]}

    return change


def prefixed(prefix):
    """Each tensor under a longer name."""

    def change(header, numbers):
        for name in list(header):
            header[name if name == "__metadata__" else prefix + name] = header.pop(name)

    return change


# ---- models and data
good = ["The film is good and I liked it.", "It was bad, so bad that I left."]
good = (good + ["A fine story, well told.", "Nothing in it is new."]) * 4
lines("texts.jsonl", *({"text": text} for text in good))
lines("prompts.jsonl", {"prompt": "The film"}, {"prompt": "It was"}, {"prompt": "A"})
lines("pairs.jsonl", *[{"prompt": "The film is", "chosen": " good", "rejected": " bad"}] * 4)
lines("rated.jsonl", *({"text": text, "score": i % 4} for i, text in enumerate(good)))
lines("labelled.jsonl", *({"text": text, "label": i % 2} for i, text in enumerate(good)))
lines("many.jsonl", *({"text": "%s %d" % (good[i % 4], i), "score": i % 4} for i in range(240)))
rollout = {"query_ids": [1, 2], "response_ids": [3, 4, 5]}
lines("rollouts.jsonl", *({**rollout, "score": i - 1} for i in range(4)))
short = " --max_steps 1 --max_length 32 --quiet --output_dir "
new = (
    "pretrain --dataset_name texts.jsonl --n_layer 2 --n_embd 16 --n_head 2 --n_positions 40"
    " --vocab_size 300"
)
for command in (
    new + short + "m",
    new + " --n_positions 48 --n_layer 1" + short + "m48",
    new + " --vocab_size 400" + short + "m400",
    "sft --model_name_or_path m --dataset_name texts.jsonl --use_peft"
    + short
    + "adapter --lora_r 2",
    "reward --model_name_or_path m --dataset_name rated.jsonl" + short + "rm",
):
    process = align(command)
    assert process.returncode == 0, (command, process.stderr)
pretrain = new + short + "out "
sft = "sft --model_name_or_path m --dataset_name texts.jsonl" + short + "out "
reward = "reward --model_name_or_path m --dataset_name pairs.jsonl" + short + "out "
dpo = "dpo --model_name_or_path m --dataset_name pairs.jsonl" + short + "out "
policy = " --model_name_or_path m --reward_model_path rm --dataset_name prompts.jsonl"
once = " --batch_size 4 --max_steps 1 --quiet --output_dir out "
ppo = "ppo --mini_batch_size 2" + policy + once
replay = "ppo --mini_batch_size 2 --model_name_or_path m --rollouts rollouts.jsonl" + once
reinforce = "reinforce" + policy + once
collect = "collect" + policy + " --quiet --output_dir out "
generate = "generate --model_name_or_path m --prompt x --max_new_tokens 4 "
following = "next --model_name_or_path m --prompt x "
bases = [pretrain, sft, reward, dpo, ppo, replay, reinforce, collect, generate, following]
stages = " --pretrain_steps 1 --reward_steps 1 --ppo_steps 1 --dpo_steps 1"
rlhf = "rlhf --model_name_or_path m48 --dataset_name many.jsonl" + stages
rlhf += " --quiet --output_dir out "
judged = "eval --model_name_or_path m --dataset_name prompts.jsonl --reward_model_path rm "

# ---- the command line
if arguments.table:
    print("| What is wrong | What align says |\n|---|---|")
# The cases are a table: what is wrong, the command, the status, the words. black would give each of
# them a line.
# fmt: off
case("A misspelt flag", sft + "--learningrate 1", 2,
     "sft has no flag --learningrate; the nearest is --learning_rate")
case("A misspelt command", "pretrian --dataset_name texts.jsonl", 2,
     'there is no command "pretrian"; the nearest is "pretrain"')
case("A flag that another command has", generate + "--beta 1", 2, "generate has no flag --beta")
case("A needed flag is missing",
     ["sft --dataset_name texts.jsonl --output_dir out",
      "sft --model_name_or_path m --output_dir out",
      "sft --model_name_or_path m --dataset_name texts.jsonl",
      "generate --model_name_or_path m",
      "next --model_name_or_path m",
      "ppo --model_name_or_path m --dataset_name prompts.jsonl --output_dir out",
      "collect --model_name_or_path m --dataset_name prompts.jsonl --reward_model_path rm",
      "merge --model_name_or_path m --output_dir out",
      "dpo --model_name_or_path m --output_dir out"], 2, "need")
case("A needed flag is missing: said before a model is read",
     ["sft --model_name_or_path nowhere --dataset_name nowhere",
      "ppo --model_name_or_path nowhere --reward_model_path nowhere --dataset_name nowhere",
      "pretrain --dataset_name nowhere",
      "merge --model_name_or_path nowhere --peft_adapter nowhere"], 2, "--output_dir is needed")
case("A flag without its value", ["sft --model_name_or_path", "sft --model_name_or_path --quiet"],
     2, "--model_name_or_path needs a value")
case("An empty value",
     [sft + "--output_dir ''",
      sft + "--model_name_or_path=",
      dpo + "--loss_type ' '",
      reward + "--loss_type ''",
      sft + "--use_peft --lora_target_modules ','"], 2, "is empty; a value was expected (")
case("Losses of which none counts",
     [dpo + "--loss_weights 0", dpo + "--loss_type sigmoid sft --loss_weights 0 0"], 2,
     "no loss counts; nothing would be learnt")
case("Ids and texts at once", "tokenize --jsonl --decode", 2,
     "--decode reads ids, --jsonl texts: give one of them")
case("What transformers and TRL take",
     [sft + f for f in ("--use_peft True",
                        "--use_peft=yes",
                        "--no_use_peft",
                        "--learning-rate 1e-5",
                        "--learning_r 1e-5",
                        "--max_steps -1 --num_train_epochs 1",
                        "--optim adamw_torch",
                        "--optim adamw_torch_fused",
                        "--warmup_steps 0.4",
                        "--warmup_ratio 0.1")], 0)
case("Flags of theirs that change nothing here",
     sft + "--bf16 false --fp16=False --report_to none --do_train --do_eval --logging_dir logs"
           " --load_best_model_at_end no --eval_strategy steps --packing false"
           " --dataloader_num_workers 4", 0,
     "note: --bf16, --fp16, --report_to, --do_train, --do_eval, --logging_dir,"
     " --load_best_model_at_end, --eval_strategy, --packing, --dataloader_num_workers: no effect in"
     " align")
case("With a value that would change something",
     [sft + f for f in ("--bf16", "--bf16 true", "--packing true", "--load_best_model_at_end",
                        "--eval_strategy epoch", "--report_to wandb", "--torch_dtype bfloat16")], 2,
     "is not supported: ", "leave it out, or give ")
case("A flag that changes nothing beside the others",
     [sft + "--lora_r 4",
      generate + "--temperature 2",
      generate + "--length_penalty 2",
      generate + "--dataset_name prompts.jsonl",
      replay + "--top_k 3",
      sft + "--eval_steps 1",
      sft + "--num_train_epochs 9"], 0, "align: note: ", ": no effect: ")
case("The beginning of several flags", dpo + "--l 1", 2,
     "--l: which of these is meant? --lora_r, --lora_alpha, ")
case("A flag of another program", [ppo + "--max_new_tokens 5", ppo + "--max_length 5"], 2,
     "the nearest is --output_max_length")
case("A word that is no flag", sft + "more", 2, '"more" is no flag')
case("The same flag twice: the last one counts", sft + "--learning_rate 1e-4 --learning_rate 0", 0)
case("Must be above 0",
     [dpo + "--beta 0",
      dpo + "--beta -1",
      sft + "--use_peft --lora_alpha -1",
      sft + "--use_peft --lora_alpha 0",
      sft + "--adam_epsilon -1",
      sft + "--adam_epsilon 0",
      ppo + "--horizon 0",
      ppo + "--target 0",
      ppo + "--ratio_threshold -1",
      ppo + "--target_kl -1",
      generate + "--repetition_penalty -1"], 2, ": a number above 0 was expected (")
case("Must be 0 or more",
     [sft + "--learning_rate -1e-4",
      sft + "--weight_decay -1",
      sft + "--max_grad_norm -1",
      reinforce + "--beta -1",
      reward + "--center_rewards_coefficient -1",
      ppo + "--init_kl_coef -1",
      ppo + "--cliprange -1",
      ppo + "--cliprange_value -1",
      ppo + "--vf_coef -1",
      ppo + "--score_clip -1"], 2, ": a number, 0 or more, was expected (")
case("Larger or smaller than a float can be",
     [sft + "--learning_rate 1e39",
      sft + "--adam_epsilon 1e-39",
      generate + "--repetition_penalty 1e39",
      generate + "--num_beams 2 --length_penalty -1e308",
      ppo + "--horizon inf"], 2, "to 3.4e+38 can be used (")
case("Must be from 0 to 1",
     [generate + "--do_sample --top_p 2", generate + "--top_p -1", ppo + "--gamma 2",
      ppo + "--lam -1"], 2, ": a number from 0 to 1 was expected (")
case("Must be from 0 to below 1",
     [sft + "--adam_beta1 1", sft + "--adam_beta2 -0.1", dpo + "--label_smoothing 1"], 2,
     ": a number from 0 to below 1 was expected (")
case("Must be a whole number, 1 or more",
     [c + " 0" for c in (sft + "--gradient_accumulation_steps",
                         sft + "--logging_steps",
                         sft + "--max_length",
                         sft + "--use_peft --lora_r",
                         ppo + "--batch_size",
                         ppo + "--mini_batch_size",
                         ppo + "--ppo_epochs",
                         ppo + "--output_min_length",
                         reinforce + "--num_generations",
                         generate + "--max_new_tokens",
                         generate + "--num_beams",
                         generate + "--num_return_sequences",
                         pretrain + "--n_layer")], 2, ": a whole number, 1 to 2^40, was expected (")
case("Must be a whole number, 1 to 4096",
     [sft + "--per_device_train_batch_size 0",
      sft + "--per_device_train_batch_size 5000",
      sft + "--per_device_eval_batch_size 0",
      "eval --model_name_or_path m --dataset_name texts.jsonl --per_device_eval_batch_size 4097"],
     2, ": a whole number, 1 to 4096, was expected (")
case("Must be a whole number",
     [sft + "--max_steps -2", sft + "--max_steps 1.5", sft + "--save_steps many",
      sft + "--max_steps 99999999999999"], 2, ": a whole number, 0 to 2^40, was expected (")
case("No number",
     [sft + "--learning_rate nan", sft + "--learning_rate inf", sft + "--learning_rate 1e-4x",
      sft + "--seed -1"], 2, "was expected")
case("Epochs without end, or none", [sft + "--num_train_epochs 1e30", sft + "--num_train_epochs 0"],
     2, ": a number above 0, at most 1e9, was expected (")
case("A temperature of 0, or one that overflows",
     [c + "--temperature 0"
      for c in (generate, following, ppo, dpo, reinforce, collect, rlhf, judged)]
     + [generate + "--do_sample --temperature 1e-30"], 2,
     ": a number, 1e-6 or more, was expected (")
case("Label smoothing of a half: no pair would count", dpo + "--label_smoothing 0.5", 1,
     "--label_smoothing 0.5: a share of mislabelled pairs, from 0 to below 0.5")
case("--beta 0 has no optimum", "exact --beta 0", 1, "--beta 0: must be above 0")
case("Loss weights that do not fit",
     [dpo + "--loss_type 'sigmoid sft' --loss_weights " + w
      for w in ("1", "'1 2 3'", "'1 x'", "'1 -1'", "'1 nan'")], 2,
     "a number, 0 or more, for each of --loss_type's names was expected")
case("An unknown name",
     [dpo + "--loss_type orpo",
      sft + "--optim adam",
      sft + "--lr_scheduler_type step",
      ppo + "--kl_penalty js",
      sft + "--train_sampling_strategy sorted"], 2, "is unknown; there are")
case("Not true or false", sft + "--quiet=perhaps", 2, "--quiet perhaps: true or false was expected")
case("vocab_size that has no room for the 256 bytes", pretrain + "--vocab_size 200", 1,
     "vocab_size 200; 257 to 65536 can be used")
case("Numbers whose product overflows",
     ppo + "--batch_size 4294967296 --mini_batch_size 4294967296 --gradient_accumulation_steps"
           " 4294967296", 1, "--batch_size 4294967296 must be a multiple of")
case("A reward model without training", rlhf + "--reward_steps 0", 1,
     "--reward_steps 0: an untrained reward model gives every text the same reward")
case("Heads that do not divide the width", pretrain + "--n_head 3", 1,
     "n_embd 16 must be a multiple of n_head 3")
case("mini_batch_size that does not divide batch_size", ppo + "--batch_size 4 --mini_batch_size 3",
     1, "--batch_size 4 must be a multiple of --mini_batch_size 3")
case("Accumulation that does not divide batch_size", ppo + "--gradient_accumulation_steps 3", 1,
     "times --gradient_accumulation_steps 3")
case("One answer cannot be compared", collect + "--num_generations 1", 1,
     "--num_generations 1: 2 or more answers are needed")
case("Leave-one-out of one answer", reinforce + "--num_generations 1", 1,
     "--num_generations 2 or more")
case("num_generations that does not divide batch_size", reinforce + "--num_generations 3", 1,
     "--batch_size 4 must be a multiple of --num_generations 3")
case("More beams than can be used", generate + "--num_beams 1000", 1,
     "--num_beams 1000: 1 to 128 can be used")
case("More sequences than beams", generate + "--num_beams 2 --num_return_sequences 3", 1,
     "2 beams give at most as many")
case("Several sequences without sampling", generate + "--num_return_sequences 3", 1,
     "without --do_sample or --num_beams all of them would be the same")
case("LengthSampler without a length", ppo + "--output_min_length 5 --output_max_length 5", 1,
     "--output_max_length 5: more than --output_min_length, 5, was expected")
case("max_length beyond the context", pretrain + "--max_length 100", 1,
     "--max_length 100 is longer than the model's context of 40")
case("A new adapter and an old one", sft + "--use_peft --peft_adapter adapter", 2,
     "give one of them")
case("Dropout in the adapter", sft + "--use_peft --lora_dropout 0.1", 2,
     "--lora_dropout 0.1: only 0 is implemented")
case("A layer that the model has not", sft + "--use_peft --lora_target_modules q_proj", 1,
     '--lora_target_modules "q_proj": no linear layer of the model has such a name')
case("A batch that memory cannot hold",
     ppo + "--batch_size 1099511627776 --mini_batch_size 1099511627776", 1, "out of memory")

# ---- odd, but with a meaning
case("top_k larger than the vocabulary: all tokens, as in transformers",
     generate + "--do_sample --top_k 100000", 0)
case("top_p 0: the likeliest token, as in transformers", generate + "--do_sample --top_p 0", 0)
case("An empty prompt: the end token starts a text",
     ["generate --model_name_or_path m --prompt '' --max_new_tokens 2",
      "next --model_name_or_path m --prompt ''"], 0)
case("A batch larger than the data: one step an epoch", sft + "--per_device_train_batch_size 4096",
     0)
case("batch_size larger than the prompts: they come again",
     ppo + "--batch_size 64 --mini_batch_size 64", 0)
case("mini_batch_size larger than batch_size: the whole batch", ppo + "--mini_batch_size 64", 0)
case("Fewer rollouts than batch_size: they come again", replay + "--batch_size 8", 0)
case("Accumulation beyond the data: one step an epoch",
     sft + "--gradient_accumulation_steps 1000000", 0)
case("beta 0 in REINFORCE: no price on KL", reinforce + "--beta 0", 0)
case("learning_rate 0: nothing moves", sft + "--learning_rate 0", 0)
case("max_grad_norm 0: no limit", sft + "--max_grad_norm 0", 0)
case("score_clip 0: no limit", ppo + "--score_clip 0", 0)
shutil.copytree("m", "own")
case("The model's own folder as output: replaced when all is written",
     "sft --model_name_or_path own --dataset_name texts.jsonl --max_steps 1 --quiet --output_dir"
     " own", 0, "note: --output_dir own is --model_name_or_path: the model there will be replaced")
case("Warm-up longer than the run", sft + "--warmup_steps 10", 0,
     "note: --warmup_steps 10: the run has 1 steps; its learning rate never reaches"
     " --learning_rate")
lines("empty_completion.jsonl", {"prompt": "a", "completion": ""})
case("An empty completion: the end token is learnt, as in TRL",
     sft + "--dataset_name empty_completion.jsonl", 0)
lines("empty_prompt.jsonl", {"prompt": "", "completion": " x", "chosen": " x", "rejected": " y"})
case("An empty prompt in training",
     [sft + "--dataset_name empty_prompt.jsonl",
      dpo + "--dataset_name empty_prompt.jsonl",
      reward + "--dataset_name empty_prompt.jsonl"], 0)
lines("empty_some.jsonl", {"text": ""}, {"text": "good"})
lines("some_empty.jsonl", {"prompt": ""}, {"prompt": "A film"})
case("Some empty prompts",
     [c + "--dataset_name some_empty.jsonl "
      for c in (ppo, reinforce, collect,
                "eval --model_name_or_path m --reward_model_path rm --quiet ")], 0,
     "note: some_empty.jsonl: 1 of 2 rows have no text to take a prompt from and are left out")
lines("some_empty_rated.jsonl",
      *({"text": "%s %d" % (good[i % 4], i) if i % 60 else "", "score": i % 4} for i in range(240)))
case("Some empty texts in the course", rlhf + "--dataset_name some_empty_rated.jsonl", 0,
     "note: some_empty_rated.jsonl: 4 of 240 texts are empty: no prompt is taken from them")
unused = {"text": "A good film.", "label": "pos", "score": "5 stars", "margin": [], "chosen": 3}
lines("unused.jsonl", unused, {**unused, "label": -1, "query_ids": "x"})
case("Fields that the command does not use may hold anything",
     [sft + "--dataset_name unused.jsonl",
      pretrain + "--dataset_name unused.jsonl --max_length 4",
      "logprob --model_name_or_path m --dataset_name unused.jsonl",
      "score --model_name_or_path rm --dataset_name unused.jsonl",
      "eval --model_name_or_path m --dataset_name unused.jsonl",
      "tokenize --jsonl unused.jsonl",
      ppo + "--dataset_name unused.jsonl"], 0)
lines("unused_label.jsonl",
      *({"text": text, "score": i % 4, "label": "pos"} for i, text in enumerate(good)))
case("A label in words beside ratings", reward + "--dataset_name unused_label.jsonl", 0)
lines("unused_margin.jsonl",
      {"prompt": "a", "chosen": " b", "rejected": " c", "margin": "wide", "score": "high"})
case("A margin in words: dpo has no margins", dpo + "--dataset_name unused_margin.jsonl", 0)
case("A margin in words: reward has", reward + "--dataset_name unused_margin.jsonl", 1,
     'unused_margin.jsonl:1: "margin" must be a number')
lines("splits/train.jsonl", *({"text": text} for text in good))
lines("splits/validation.jsonl", *({"text": text} for text in good[:3]))
lines("splits/test.jsonl", {"text": good[0]})
reads = "note: splits: read train.jsonl; left out test.jsonl, validation.jsonl"
case("A folder with splits: trains on its train split",
     [c + "--dataset_name splits" for c in (sft, pretrain + "--max_length 8 ", ppo)], 0, reads)
case("A folder with splits: other commands read the same",
     ["eval --model_name_or_path m --dataset_name splits",
      "logprob --model_name_or_path m --dataset_name splits",
      "score --model_name_or_path rm --dataset_name splits"], 0, reads)
case("A folder with splits: held out is its validation split",
     sft + "--dataset_name splits --eval_dataset splits", 0, reads,
     "note: splits: read validation.jsonl as held-out data; left out test.jsonl, train.jsonl")
lines("one_split/train.jsonl", {"text": "good"})
case("A folder of one split has no held-out rows",
     sft + "--dataset_name one_split --eval_dataset one_split", 1,
     'one_split: no held-out row with "text" was found: the training reads what is there'
     ' (train.jsonl)')
lines("held_out/test.jsonl", {"text": "good"})
case("A folder of held-out files alone",
     [sft + "--dataset_name held_out", "eval --model_name_or_path m --dataset_name held_out"], 1,
     'held_out: no row with "prompt" + "completion", or "text" was found but in held-out data'
     ' (test.jsonl); name the file that is meant: held_out/test.jsonl')
case("The same held out", sft + "--eval_dataset held_out", 0)
case("Some empty texts", sft + "--dataset_name empty_some.jsonl", 0,
     "note: empty_some.jsonl: 1 of 2 rows have no token to learn from and are left out")
lines("same.jsonl", {"prompt": "a", "chosen": " b", "rejected": " b"})
case("chosen and rejected are the same: nothing could be learnt",
     [dpo + "--dataset_name same.jsonl", reward + "--dataset_name same.jsonl"], 1, "same.jsonl: ",
     "left")
case("The same: the sft loss learns from chosen",
     dpo + "--loss_type 'sigmoid sft' --dataset_name same.jsonl", 0)
lines("same_whole.jsonl", {"chosen": "a b", "rejected": "a b"},
      {"chosen": "a b", "rejected": "a c"})
case("The same without a prompt of their own, beside another pair",
     [dpo + "--dataset_name same_whole.jsonl",
      reward + "--dataset_name same_whole.jsonl",
      dpo + "--eval_dataset same_whole.jsonl",
      reward + "--eval_dataset same_whole.jsonl"], 0,
     "note: same_whole.jsonl: 1 of 2 pairs are left out: chosen and rejected are the same")
lines("same_start.jsonl", {"prompt": "a", "chosen": " b" * 40 + " c", "rejected": " b" * 40 + " d"},
      {"prompt": "a", "chosen": " b" * 40, "rejected": " c"})
case("The same up to the cut", dpo + "--dataset_name same_start.jsonl", 0,
     "note: same_start.jsonl: 2 of 2 pairs were cut to their first 32 tokens (--max_length)",
     "note: same_start.jsonl: 1 of 2 pairs are left out: chosen and rejected are the same up to the"
     " cut at 32 tokens (--max_length)")
lines("prefix.jsonl", {"chosen": "It is", "rejected": "It is bad"})
case("chosen is the beginning of rejected",
     [dpo + "--dataset_name prefix.jsonl", reward + "--dataset_name prefix.jsonl"], 0)
lines("one_class.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 1})
case("Labels of one class", reward + "--loss_type bce --dataset_name one_class.jsonl", 0,
     "note: one_class.jsonl: every label is 1")
lines("long.jsonl", {"text": "word " * 200, "prompt": "word " * 200})
case("Texts longer than the context",
     [sft + "--dataset_name long.jsonl",
      "logprob --model_name_or_path m --dataset_name long.jsonl",
      "score --model_name_or_path rm --dataset_name long.jsonl"], 0, "tokens")
write("windows.jsonl", b'{"text": "good"}\r\n\r\n{"text": "bad"}\r\n')
case("Windows line ends and empty lines", sft + "--dataset_name windows.jsonl", 0)
write("bom.jsonl", b'\xef\xbb\xbf{"text": "good"}\n')
case("A byte order mark of UTF-8", sft + "--dataset_name bom.jsonl", 0)
write("no_end.jsonl", '{"text": "good"}\n{"text": "bad"}')
case("No line end at the end", sft + "--dataset_name no_end.jsonl", 0)

# ---- the end token, and other special tokens
look = "next --prompt x --model_name_or_path "
model("eos13", config={"eos_token_id": 13})
case("The end token is an ordinary token: a note", look + "eos13", 0,
     'note: eos13: its end token, eos_token_id 13, is the ordinary token "."; to this model a text'
     ' ends wherever it contains that token')
lines("learn.jsonl",
      {"prompt": "The film is", "completion": " good", "chosen": " good", "rejected": " bad"})
for name, command in (("sft", "sft"), ("dpo", "dpo --loss_type sft")):
    if not wanted("end token"):
        continue
    shutil.rmtree("out", ignore_errors=True)
    align(command + " --learning_rate 3e-2 --model_name_or_path eos13 --dataset_name learn.jsonl"
                    " --max_steps 60 --quiet --output_dir out")
    said = align("generate --model_name_or_path out --prompt 'The film is'").stdout
    said_json = align("generate --model_name_or_path out --prompt 'The film is' --json").stdout
    good_json = said_json.endswith(b', 13]], "texts": [" good."]}\n')
    result("The end token is an ordinary token: %s, then generate, which stops at it" % name,
           outcome(said == b"The film is good\n" and good_json, "%r, %r" % (said, said_json)))
ids = {
    "-1": "found -1",
    "2.5": "found 2.5",
    '"13"': "found a string",
    "300": "found 300",
    "true": "found true",
    "{}": "found an object",
    "[299, 13]": "lists 2 ids, and one can be used; write it in place of the list",
    "[]": "lists 0 ids",
}
for i, (value, words) in enumerate(ids.items()):
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if key == "bos_token_id" and value == "300":
            continue  # transformers writes 50256 unless it is told
        folder = "%s%d" % (key, i)
        model(folder, config={key: json.loads(value)})
        case("%s is %s" % (key, value), look + folder, 1, folder + '/config.json: "%s" ' % key,
             words)
for i, value in enumerate((None, [299])):
    model("fine%d" % i,
          config={key: value for key in ("eos_token_id", "pad_token_id", "bos_token_id")})
    case("eos_token_id, pad_token_id and bos_token_id are %s" % json.dumps(value),
         look + "fine%d" % i, 0)
align(new + " --vocab_size 50304 --n_layer 1" + short + "padded")
case("A vocabulary rounded up to 50304", look + "padded", 0)
model("unnamed", config={"eos_token_id": 50300}, base="padded")
case("An end token that is no token", look + "unnamed", 1,
     "unnamed: its end token, id 50300, is no token of ",
     'write "eos_token_id": 50256 in config.json')
added = {"added_tokens.json": {"<|im_end|>": 50257},
         "tokenizer.json": {"added_tokens": [{"id": 50256, "content": "<|endoftext|>"},
                                             {"id": 50257, "content": "<|im_end|>"}]},
         "tokenizer_config.json": {"model_max_length": 50258,
                                   "added_tokens_decoder": {"50257": {"content": "<|im_end|>"}}}}
for file, content in added.items():
    for eos, words in ((50257, "its end token, id 50257, is"), (50256, "id 50257 is")):
        folder = "%s%d" % (file, eos)
        model(folder, config={"eos_token_id": eos}, base="padded")
        write("%s/%s" % (folder, file), json.dumps(content))
        case("An added token, named by %s%s" % (file, ", is the end token" * (eos == 50257)),
             look + folder, 1, '%s: %s "<|im_end|>", an added token that ' % (folder, words),
             "this model cannot be used")
model("pad", config={"pad_token_id": 50257}, base="padded")
write("pad/added_tokens.json", '{"[PAD]": 50257}')
for folder, after in (("pad", "pad2"), ("pad2", "pad3")):
    if not wanted("added token that only pads"):
        continue
    align("sft --model_name_or_path %s --dataset_name texts.jsonl" % folder + short + after)
    kept = json.loads(read(after + "/tokenizer_config.json"))["pad_token"] == "[PAD]"
    result("An added token that only pads is kept under its name: %s" % after,
           outcome(kept, "its name is lost in " + after))
model("bos", config={"bos_token_id": 13})
if wanted("empty prompt"):
    line = "generate --model_name_or_path %s --max_new_tokens 3 --prompt '%s'"
    said, said_dot, said_end = (align(line % pair).stdout
                                for pair in (("bos", ""), ("bos", "."), ("m", "")))
    result("An empty prompt starts from bos_token_id",
           outcome(b"." + said == said_dot != b"." + said_end,
                   "%r, %r, %r" % (said, said_dot, said_end)))
lines("written.jsonl",
      {"text": "a fine film<|endoftext|>", "prompt": "a", "completion": "b<|endoftext|>",
       "chosen": "c", "rejected": "d<|endoftext|>", "score": 1},
      {"text": "a bad film", "prompt": "a", "completion": "b", "chosen": "c", "rejected": "d",
       "score": 3})
lines("written_texts.jsonl", {"text": "a fine film<|endoftext|>", "score": 1},
      {"text": "a bad film", "score": 3})
note = 'jsonl: 1 of 2 rows contain "<|endoftext|>", which is ordinary text here; leave it out'
for command in (
    sft + "--dataset_name written.jsonl",
    sft + "--dataset_name written_texts.jsonl",
    dpo + "--dataset_name written.jsonl",
    reward + "--dataset_name written.jsonl",
    reward + "--dataset_name written_texts.jsonl",
    pretrain + "--max_length 4 --dataset_name written_texts.jsonl",
    sft + "--eval_dataset written_texts.jsonl",
    "eval --model_name_or_path m --dataset_name written.jsonl",
    "eval --model_name_or_path rm --dataset_name written_texts.jsonl",
):
    what = "Texts with <|endoftext|> in them: one note a data set: `%s`" % command
    if not wanted(what):
        continue
    shutil.rmtree("out", ignore_errors=True)
    process = align(command)
    said = process.stderr.decode()
    one = said.count("endoftext") == said.count(note) == 1
    result(what, problem_of(process, 0, ()) or outcome(one, "not one note: " + said))
case("Texts with <|endoftext|> in them where no end token is added",
     ["logprob --model_name_or_path m --dataset_name written.jsonl",
      "score --model_name_or_path rm --dataset_name written_texts.jsonl"], 0)

# ---- data
case("A file that is not there", sft + "--dataset_name nowhere.jsonl", 1,
     "nowhere.jsonl: No such file")
write("data.csv", "text,label\nA fine film.,1\n")
case("A file without end",
     [sft + "--dataset_name /dev/zero",
      "logprob --model_name_or_path m --dataset_name /dev/zero",
      "generate --model_name_or_path m --prompt a --tokenizer /dev/zero"], 1,
     "/dev/zero: has no end within 1 GB")
case("A CSV as data", sft + "--dataset_name data.csv", 1,
     "data.csv: is a table (CSV), JSON Lines were expected; run: python3 -c ",
     "pandas.read_csv(sys.argv[1]).to_json(orient='records', lines=True), end='')\" data.csv "
     "> rows.jsonl")
write("data.tsv", "text\tlabel\nA fine film.\t1\n")
case("A table with tabs as data", [c + "--dataset_name data.tsv" for c in (sft, dpo, reward, ppo)],
     1, "data.tsv: is a table (TSV)", "pandas.read_table(sys.argv[1])")
for name, start, kind, remedy in (
    ("data.parquet", b"PAR1\x15\x04", "Parquet", "pandas.read_parquet(sys.argv[1])"),
    ("data.feather", b"ARROW1\0\0", "an Arrow file", "pandas.read_feather(sys.argv[1])"),
    ("data.arrow", b"\xff\xff\xff\xff\x10\x01", "an Arrow stream",
     "Dataset.from_file(sys.argv[1])"),
    ("data.jsonl.gz", b"\x1f\x8b\x08\0", "compressed by gzip",
     "gzip -dc data.jsonl.gz > rows.jsonl"),
    ("data.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "compressed by zstd",
     "zstd -dc data.jsonl.zst > rows.jsonl"),
    ("data.jsonl.bz2", b"BZh91AY&SY", "compressed by bzip2",
     "bzip2 -dc data.jsonl.bz2 > rows.jsonl"),
    ("data.jsonl.xz", b"\xfd7zXZ\0", "compressed by xz", "xz -dc data.jsonl.xz > rows.jsonl"),
    ("data.zip", b"PK\x03\x04\x14", "a zip archive", "unzip -p data.zip > rows.jsonl"),
):
    write(name, start)
    case("Data in another format: %s" % kind, sft + "--dataset_name " + name, 1,
         "%s: is %s" % (name, kind), "JSON Lines were expected; run: ", remedy)
write("data.txt", "A fine film.\n")
case("A text file as data", sft + "--dataset_name data.txt", 1, "data.txt:1: not JSON",
     "one object a line")
write("array.json", '[\n  {"text": "a"}\n]\n')
case("A JSON array as data",
     [sft + "--dataset_name array.json", dpo + "--eval_dataset array.json",
      "tokenize --jsonl array.json"], 1,
     "array.json: is a JSON array, JSON Lines were expected; run: python3 -c ",
     "json.load(open(sys.argv[1]))]\" array.json > rows.jsonl")
write("pretty.jsonl", '{\n  "text": "a"\n}\n')
case("JSON over several lines", sft + "--dataset_name pretty.jsonl", 1, "pretty.jsonl:1: not JSON",
     "the object goes on in the next line, it must be on one; run: jq -c . pretty.jsonl >"
     " rows.jsonl")
write("broken_text.jsonl", '{"text": "a\nb"}\n')
case("A line break inside a text", sft + "--dataset_name broken_text.jsonl", 1,
     "broken_text.jsonl:1: not JSON: a string without its closing quote; a line break in it is \\n")
for what, row, words in (
    ("NaN", '{"text": "a", "score": NaN}',
     "NaN is not JSON; write null, or leave the field out (byte 24)"),
    ("Infinity", '{"text": "a", "score": -Infinity}', "-Infinity is not JSON"),
    ("None", '{"text": None}', "None is Python, JSON has null"),
    ("True", '{"text": "a", "x": True}', "True is Python, JSON has true"),
    ("single quotes", "{'text': 'a'}", 'a single quote, JSON has " alone'),
    ("a comment", '{"text": "a"} // good', "a comment, JSON has none; take it out (byte 15)"),
    ("a comment of its own line", '# texts\n{"text": "a"}', "a comment, JSON has none"),
    ("a comma behind the object", '{"text": "a"},\n{"text": "b"}',
     "a comma follows its end; take it out (byte 14)"),
):
    write("foreign.jsonl", row + "\n")
    case("What is not JSON: %s" % what, sft + "--dataset_name foreign.jsonl", 1,
         "foreign.jsonl:1: not JSON: " + words)
user = [{"role": "user", "content": "Hi"}]
yes, no = ([{"role": "assistant", "content": word}] for word in ("Yes", "No"))
chats = {"messages": (sft, {"messages": user + yes}),
         "chosen": (dpo, {"prompt": "Hi", "chosen": user + yes, "rejected": user + no}),
         "prompt": (ppo, {"prompt": user}),
         "completion": (sft, {"prompt": "Hi", "completion": yes})}
for field, (command, row) in chats.items():
    lines("chat.jsonl", row, row)
    what, ask = "A chat: %s" % field, command + "--dataset_name chat.jsonl"
    case(what, ask, 1,
         'chat.jsonl:1: "%s" is a chat, a list of messages, a string was expected' % field
         + " (GPT-2 has no chat template); flatten it: python3 -c ")
    if not wanted(what):
        continue
    flatten = last_line(align(ask)).split("flatten it: ")[1]
    formats = read(ROOT + "/docs/formats.md").decode()
    result("%s: the command in docs/formats.md" % what,
           outcome(flatten in formats, "it is another: " + flatten))
    subprocess.run(flatten, shell=True, capture_output=True)
    flat = [json.loads(line) for line in read("rows.jsonl").splitlines()]
    texts = [value for each in flat for value in each.values()]
    said = all(isinstance(t, str) and re.match("(user|assistant): ", t) for t in texts)
    result("%s: what the command in the message writes" % what,
           outcome(len(flat) == 2 and said, str(flat)))
    if field in ("messages", "chosen", "prompt"):
        case("%s: that can be read" % what, command + "--dataset_name rows.jsonl", 0)
write("comma.jsonl", '{"text": "a"}\n{"text": "b",}\n')
case("A trailing comma", sft + "--dataset_name comma.jsonl", 1,
     "comma.jsonl:2: not JSON: a comma before the closing bracket; take it out (byte 14)")
write("cut.jsonl", '{"text": "a"}\n{"text": "b')
case("A last line that is cut short", sft + "--dataset_name cut.jsonl", 1, "cut.jsonl:2: not JSON")
write("twice.jsonl", '{"text": "a"} {"text": "b"}\n')
case("Two objects on a line", sft + "--dataset_name twice.jsonl", 1,
     "twice.jsonl:1: not JSON: something follows its end (byte 15)")
lines("other.jsonl", {"text": "a"}, {"review": "b"})
case("A line without the field", sft + "--dataset_name other.jsonl", 1,
     'other.jsonl:2: expected "text", found no field that is known')
lines("type.jsonl", {"text": 7})
case("The wrong type in a field", sft + "--dataset_name type.jsonl", 1,
     'type.jsonl:1: "text" must be a string')
lines("label.jsonl", {"text": "a", "label": 2})
case("A label that is none", reward + "--loss_type bce --dataset_name label.jsonl", 1,
     'label.jsonl:1: "label" must be 0 or 1')
case("Data of another shape",
     [dpo + "--dataset_name texts.jsonl", reward + "--dataset_name texts.jsonl"], 1,
     'texts.jsonl:1: expected "chosen" + "rejected"', 'found "text"')
case("eval_dataset of another shape",
     [sft + "--eval_dataset pairs.jsonl", dpo + "--eval_dataset texts.jsonl"], 1,
     ".jsonl:1: expected ")
case("bce on pairs", reward + "--loss_type bce", 1, 'pairs.jsonl:1: expected "text" + "label"')
write("latin.jsonl", '{"text": "caf\u00e9"}\n'.encode("latin-1"))
case("Latin-1", sft + "--dataset_name latin.jsonl", 1, "latin.jsonl:1: not JSON", "UTF-8")
write("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"))
case("UTF-16", sft + "--dataset_name utf16.jsonl", 1, "utf16.jsonl:1: not JSON", "UTF-16", "iconv")
write("empty.jsonl", "")
case("An empty file", sft + "--dataset_name empty.jsonl", 1,
     'empty.jsonl: no row with "prompt" + "completion", or "text" was found')
os.makedirs("folder")
case("A folder without .jsonl", sft + "--dataset_name folder", 1, "folder: no row with")
lines("empties.jsonl", {"text": ""})
case("Only empty texts", sft + "--dataset_name empties.jsonl", 1,
     "empties.jsonl: no row has a token to learn from")
lines("empty_prompts.jsonl", {"prompt": ""})
case("Only empty prompts", ppo + "--dataset_name empty_prompts.jsonl", 1, "every prompt is empty")
lines("long_prompt.jsonl", {"prompt": "a b " * 100})
case("A prompt longer than the context",
     [ppo + "--dataset_name long_prompt.jsonl",
      "generate --model_name_or_path m --dataset_name long_prompt.jsonl",
      "next --model_name_or_path m --prompt '%s'" % ("a b " * 30)], 1, "tokens", "context")
case("A prompt that fills the context is answered with one token, as transformers does",
     ["generate --model_name_or_path m --prompt '%s' --max_new_tokens 2" % ("qz" * 20),
      "generate --model_name_or_path m --prompt '%s' --num_beams 2 --json" % ("qz" * 20)], 0,
     "--max_new_tokens asks for up to 2",
     "after the longest prompt the model's context of 40 (n_positions) has room for 1")
case("More new tokens than the context holds",
     [generate + "--max_new_tokens 100",
      generate + "--max_new_tokens 100 --do_sample",
      collect + "--max_new_tokens 100"], 0,
     "--max_new_tokens asks for up to 100 new tokens; after the longest prompt the model's context"
     " of 40 (n_positions) has room for ")
case("More new tokens than the context holds, drawn",
     [ppo + "--output_max_length 101", reinforce + "--output_max_length 101"], 0,
     "--output_max_length asks for up to 100 new tokens", "has room for 3")
lines("long_pair.jsonl", {"prompt": "a b " * 100, "chosen": " a", "rejected": " b"})
case("Every pair too long",
     [dpo + "--dataset_name long_pair.jsonl", reward + "--dataset_name long_pair.jsonl"], 1,
     "long_pair.jsonl: ", "left")
lines("equal.jsonl", *({"text": text, "score": 2} for text in good))
case("All ratings equal", reward + "--dataset_name equal.jsonl", 1,
     "equal.jsonl: no two ratings differ by 1 or more, so there is nothing to compare")
lines("one.jsonl", {"text": "good", "score": 1})
case("One rated text", reward + "--dataset_name one.jsonl", 1,
     "one.jsonl: 1 texts are left; a pair or two texts are needed to compare")
lines("little.jsonl", {"text": "good"})
case("Too little text for one row", pretrain + "--dataset_name little.jsonl", 1, "the texts have",
     "a row needs 33; use more text or a smaller --max_length")
lines("little_prompt.jsonl", {"prompt": "good"})
lines("one_pair.jsonl", {"prompt": "a", "chosen": " b", "rejected": " c"})
case("One row",
     [sft + "--dataset_name little.jsonl",
      dpo + "--dataset_name one_pair.jsonl",
      ppo + "--dataset_name little_prompt.jsonl"], 0)
write("nan.jsonl", '{"query_ids": [1], "response_ids": [2], "score": NaN}\n')
case("NaN as a score", replay + "--rollouts nan.jsonl", 1,
     "nan.jsonl:1: not JSON: NaN is not JSON; write null, or leave the field out")
write("null.jsonl", '{"query_ids": [1], "response_ids": [2], "score": null}\n')
case("null as a score", replay + "--rollouts null.jsonl", 1,
     'null.jsonl: rollout 1 has no "score"; a number was expected')
write("huge.jsonl", '{"query_ids": [1], "response_ids": [2], "score": 1e39}\n')
case("A score that no float holds", replay + "--rollouts huge.jsonl", 1,
     'huge.jsonl:1: "score" must be a number, at most 3.4e38')
lines("ids.jsonl", {"query_ids": [1], "response_ids": [999], "score": 1})
case("An id outside the vocabulary", replay + "--rollouts ids.jsonl", 1, "999", "300")
lines("no_response.jsonl", {"query_ids": [1], "response_ids": [], "score": 1})
case("A rollout without a response", replay + "--rollouts no_response.jsonl", 1,
     "rollout 1 has an empty query or response")
lines("long_rollout.jsonl", {"query_ids": [1], "response_ids": [2] * 60, "score": 1})
case("A rollout longer than the context", replay + "--rollouts long_rollout.jsonl", 1,
     "rollout 1 has 61 tokens, the model's context is 40")

# ---- models
case("No such model", "generate --model_name_or_path nowhere --prompt x", 1,
     "nowhere: no such folder; a model is a folder with config.json and model.safetensors")
case("A folder that is no model", "generate --model_name_or_path folder --prompt x", 1,
     "folder: no config.json inside")
model("bin")
os.rename("bin/model.safetensors", "bin/pytorch_model.bin")
case("A pytorch_model.bin", "generate --model_name_or_path bin --prompt x", 1,
     "bin: no model.safetensors inside", "safe_serialization=True")
model("llama", config={"model_type": "llama"})
case("A Llama", "generate --model_name_or_path llama --prompt x", 1,
     'llama/config.json: "model_type": gpt2 is implemented, llama is not: it changes the'
     ' mathematics')
for activation in ("gelu_pytorch_tanh", "gelu_fast"):
    model(activation, config={"activation_function": activation})
    case("gelu_new by another name", generate + "--model_name_or_path " + activation, 0)
model("gelu", config={"activation_function": "gelu"})
case("gelu without the approximation", generate + "--model_name_or_path gelu", 1,
     '"activation_function": gelu_new is implemented, gelu is not')
model("heads", config={"num_attention_heads": 2})
case("n_head and its other name agree", generate + "--model_name_or_path heads", 0)
model("heads4", config={"num_attention_heads": 4})
case("n_head and its other name differ", generate + "--model_name_or_path heads4", 1,
     'heads4/config.json: "n_head" is 2, but "num_attention_heads", another name for it, is 4')
model("relu", config={"activation_function": "relu"})
case("Another activation", "generate --model_name_or_path relu --prompt x", 1,
     '"activation_function": gelu_new is implemented, relu is not')
model("comma")
write("comma/config.json", read("m/config.json").replace(b"\n}", b",\n}"))
case("config.json with a trailing comma", "generate --model_name_or_path comma --prompt x", 1,
     "comma/config.json: not JSON")
model("asks")
write("asks/generation_config.json",
      json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 50, "eos_token_id": [299, 1],
                  "max_length": 20, "transformers_version": "5"}))
case("A generation_config.json that asks for something",
     "generate --model_name_or_path asks --prompt x", 0,
     "asks/generation_config.json: do_sample, temperature, eos_token_id: not read; say by flags"
     " what generate is to do")
write("asks/generation_config.json",
      json.dumps({"_from_model_config": True, "bos_token_id": 299, "eos_token_id": 299,
                  "pad_token_id": 299, "transformers_version": "5"}))
if wanted("generation_config.json as transformers writes it"):
    process = align("generate --model_name_or_path asks --prompt x")
    result("A generation_config.json as transformers writes it for every model: no note",
           problem_of(process, 0, ()) or process.stderr.decode())
model("layers", config={"n_layer": 3})
case("config.json of a deeper model", "generate --model_name_or_path layers --prompt x", 1,
     "tensor h.2.ln_1.weight is missing; expected shape [16]")
model("truncated")
write("truncated/model.safetensors", read("m/model.safetensors")[:-100])
case("A safetensors file that is cut short", "generate --model_name_or_path truncated --prompt x",
     1, "truncated/model.safetensors: ", "cut short")
write("truncated/model.safetensors", b"<html>404</html>")
case("A web page in place of the weights", "generate --model_name_or_path truncated --prompt x", 1,
     "not a safetensors file")
write("truncated/model.safetensors",
      "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n")
case("A Git LFS pointer in place of the weights",
     "generate --model_name_or_path truncated --prompt x", 1,
     "truncated/model.safetensors: is a Git LFS pointer, not the file itself; fetch it: git lfs"
     " pull")
model("lfs")
write("lfs/vocab.json", read("truncated/model.safetensors"))
write("lfs.bin", read("truncated/model.safetensors"))
case("A Git LFS pointer in place of another file",
     [generate + "--model_name_or_path lfs",
      generate + "--tokenizer lfs.bin",
      sft + "--dataset_name lfs.bin",
      replay + "--rollouts lfs.bin"], 1,
     ": is a Git LFS pointer, not the file itself; fetch it: git lfs pull")
write("truncated/model.safetensors", "")
case("An empty weights file", "generate --model_name_or_path truncated --prompt x", 1,
     "not a safetensors file")
model("shallow", config={"n_layer": 1})
case("config.json of a shallower model", generate + "--model_name_or_path shallow", 0,
     "note: shallow: tensors in its weights that config.json has no place for are not read: 12, the"
     " first is transformer.h.1.")
model("spare", add("multiple_choice_head.summary.weight", [1, 16], 0.5))
case("A head that is none of ours", generate + "--model_name_or_path spare", 0,
     "are not read: 1, the first is multiple_choice_head.summary.weight")
for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."):
    model("prefix_" + prefix, prefixed(prefix))
    case("Names as torch.compile and DataParallel write them: " + prefix,
         generate + "--model_name_or_path prefix_" + prefix, 0)
model("prefix_foo", prefixed("foo."))
case("Names with an unknown prefix", generate + "--model_name_or_path prefix_foo", 1,
     "prefix_foo: tensor wte.weight is missing; expected shape [300, 16]; there is"
     " foo.transformer.wte.weight")
model("copy", add("lm_head.weight", [300, 16], "transformer.wte.weight"))
case("lm_head.weight beside wte.weight, equal", generate + "--model_name_or_path copy", 0)
model("untied", add("lm_head.weight", [300, 16], 0.5))
case("An output layer of its own",
     ["%s--model_name_or_path untied" % c for c in (generate, sft, dpo, ppo)]
     + [dpo + "--ref_model untied"], 1,
     "untied: lm_head.weight is not wte.weight (number 0 is 0.5, not ",
     "an output layer of its own is not implemented; take lm_head.weight out if wte is meant to be"
     " it, as in GPT-2")
model("drawn", config={"tie_word_embeddings": False})
case("No output layer, and it is not tied", generate + "--model_name_or_path drawn", 1,
     '"tie_word_embeddings" is false in config.json, but there is no lm_head.weight: transformers'
     ' would draw it at random')
model("missing", lambda header, numbers: header.pop("transformer.h.1.mlp.c_fc.weight"))
case("A tensor is missing", "generate --model_name_or_path missing --prompt x", 1,
     "tensor h.1.mlp.c_fc.weight is missing; expected shape [16, 64]")
model("shape",
      lambda header, numbers: header["transformer.h.1.mlp.c_fc.weight"].update(shape=[64, 16]))
case("A tensor of another shape", "generate --model_name_or_path shape --prompt x", 1,
     "tensor h.1.mlp.c_fc.weight: expected shape [16, 64], found [64, 16]")
model("dtype", lambda header, numbers: header["transformer.ln_f.bias"].update(dtype="I64"))
case("A type that is no float", "generate --model_name_or_path dtype --prompt x", 1,
     "tensor ln_f.bias has type I64; F32, F16 and BF16 are read")
model("m_nan", plant("h.1.attn.c_proj.weight", 7, float("nan")))
model("m_inf", plant("wte.weight", 9, float("inf")))
case("NaN in a model's weights",
     ["%s --model_name_or_path m_nan" % c for c in (generate, sft, dpo)]
     + [dpo + "--ref_model m_nan"], 1,
     "m_nan/model.safetensors: tensor h.1.attn.c_proj.weight: number 7 is nan, a finite one was"
     " expected")
case("An infinite weight", generate + "--model_name_or_path m_inf", 1,
     "m_inf/model.safetensors: tensor wte.weight: number 9 is inf")
case("A reference of another vocabulary", dpo + "--ref_model m400", 1,
     "--ref_model m400 has 400 ids, the model 300")
case("A language model as reward model",
     [ppo + "--reward_model_path m", "score --model_name_or_path m --dataset_name texts.jsonl"], 1,
     "m: has no score.weight: it is no reward model; train one: align reward")
for name, command in (
    ("sft", sft),
    ("pretrain", "pretrain --dataset_name texts.jsonl" + short + "out "),
    ("dpo", dpo),
    ("ppo", ppo),
    ("reinforce", reinforce),
    ("generate", generate),
    ("next", following),
    ("collect", collect),
    ("logprob", "logprob --dataset_name texts.jsonl "),
    ("eval", "eval --dataset_name prompts.jsonl --reward_model_path rm "),
    ("rlhf", "rlhf --dataset_name many.jsonl --quiet --output_dir out" + stages + " "),
):
    of = "rm48" if name == "rlhf" else "rm"
    if name == "rlhf":
        align("reward --model_name_or_path m48 --dataset_name rated.jsonl" + short + "rm48")
    case("A reward model as language model: " + name, command + "--model_name_or_path " + of, 0,
         "note: %s: is a reward model; its head, score.weight, is left out," % of
         + " the language model below it is used")
case("A reward model trained further, or as reference",
     [reward + "--model_name_or_path rm",
      dpo + "--ref_model rm",
      "score --model_name_or_path rm --dataset_name texts.jsonl"], 0)
align(ppo + "--output_dir valued")
case("A model with a value head trained without one",
     [sft + "--model_name_or_path valued",
      dpo + "--model_name_or_path valued",
      reward + "--model_name_or_path valued",
      reinforce + "--model_name_or_path valued"], 0,
     "note: valued: has a value head; it is left out, the language model below it is used")
case("A model with a value head as reward model",
     [ppo + "--reward_model_path valued",
      "score --model_name_or_path valued --dataset_name texts.jsonl"], 1,
     "valued: has no score.weight: it is no reward model")
model("two", add("score.weight", [2, 16], 0.5),
      config={"id2label": {"0": "NEGATIVE", "1": "POSITIVE"}})
case("A classifier of two labels",
     ["score --model_name_or_path two --dataset_name texts.jsonl",
      ppo + "--reward_model_path two",
      reward + "--model_name_or_path two"], 0,
     'note: two/model.safetensors: a classifier of two labels is read as a reward model: the reward'
     ' is the logit of "POSITIVE" minus that of "NEGATIVE"; saved again, it has one label')
model("regression", add("score.weight", [2, 16], 0.5), config={"problem_type": "regression"})
case("Two numbers that are no labels",
     "score --model_name_or_path regression --dataset_name texts.jsonl", 1,
     '"problem_type": single_label_classification is implemented, regression is not')
model("five", add("score.weight", [5, 16], 0.5))
case("A classifier of five labels", "score --model_name_or_path five --dataset_name texts.jsonl", 1,
     "five/model.safetensors: score.weight has 5 labels; one is a reward, two are a classifier's"
     " negative and positive; more are not read")
shutil.copytree("adapter", "orphan")
write("orphan/adapter_config.json",
      read("adapter/adapter_config.json").replace(b'_path": "m"', b'_path": "gone"'))
case("An adapter whose base is not here", "generate --model_name_or_path orphan --prompt x", 1,
     'orphan: its base "gone" is not here', "--peft_adapter DIR")
case("A model as adapter", generate + "--peft_adapter m", 1, "m: no adapter_config.json inside")
case("An adapter on another model",  # its layers are alike
     "generate --model_name_or_path m400 --prompt x --peft_adapter adapter", 0)
align(new + " --n_embd 32 --n_head 2" + short + "wide")
case("An adapter of another width",
     "generate --model_name_or_path wide --prompt x --peft_adapter adapter", 1,
     "expected shape [2, 32], found [2, 16]")
case("merge over the adapter's base",
     ["merge --model_name_or_path adapter --output_dir m",
      "merge --model_name_or_path adapter --output_dir ./m/",
      "merge --model_name_or_path m --peft_adapter adapter --output_dir m"], 1,
     "is the adapter's base; merged over it, the adapter would count twice from then on; choose"
     " another folder")
shutil.copytree("adapter", "onward")
case("An adapter trained on in its own folder",
     "sft --model_name_or_path m --dataset_name texts.jsonl --peft_adapter onward --max_steps 1"
     " --quiet --output_dir onward", 0,
     "note: --output_dir onward is --peft_adapter: the model there will be replaced")
case("merge without an adapter", "merge --model_name_or_path m --output_dir out", 2,
     "merge needs an adapter")
case("An adapter where a model is",
     "sft --model_name_or_path m --dataset_name texts.jsonl --use_peft --max_steps 1 --output_dir"
     " m400", 1, "--output_dir m400: holds a model already; choose another folder for the adapter")
case("Nothing to resume from: starts over", sft + "--resume_from_checkpoint true", 0,
     "no whole checkpoint to resume from; starting over")
case("A checkpoint that is not there", sft + "--resume_from_checkpoint nowhere", 1,
     "--resume_from_checkpoint nowhere: no checkpoint is there")
firsts = {"first_sft": sft, "first_dpo": dpo, "first_ppo": ppo, "first_reinforce": reinforce}
for name, command in firsts.items():
    if wanted("Resumed with other data, flags, or command"):
        align(command + "--save_steps 1 --output_dir " + name)
for command, change, words in (
    (sft, "first_sft/checkpoint-1 --seed 3", "--seed is 3, in the checkpoint's run it was 42"),
    (sft, "first_sft/checkpoint-1 --dataset_name many.jsonl",
     "the number of rows to train on is 240, in the checkpoint's run it was 16"),
    (sft, "first_sft/checkpoint-1 --gradient_accumulation_steps 2",
     "the number of rows in a step (--per_device_train_batch_size times"
     " --gradient_accumulation_steps) is 16, in the checkpoint's run it was 8"),
    (dpo, "first_dpo/checkpoint-1 --per_device_train_batch_size 2",
     "the number of rows in a step (--per_device_train_batch_size times"
     " --gradient_accumulation_steps) is 2, in the checkpoint's run it was 8"),
    (dpo, "first_sft/checkpoint-1", "is a checkpoint of sft; dpo cannot go on from it"),
    (ppo, "first_ppo/checkpoint-1 --batch_size 8",
     "--batch_size is 8, in the checkpoint's run it was 4"),
    (ppo, "first_ppo/checkpoint-1 --dataset_name texts.jsonl",
     "the number of prompts is 16, in the checkpoint's run it was 3"),
    (replay, "first_ppo/checkpoint-1",
     "the number of prompts is 0, in the checkpoint's run it was 3"),
    (reinforce, "first_reinforce/checkpoint-1 --dataset_name texts.jsonl",
     "the number of prompts is 16, in the checkpoint's run it was 3"),
    (reinforce, "first_ppo/checkpoint-1", "is a checkpoint of ppo; reinforce cannot go on from it"),
):
    case("Resumed with other data, flags, or command",
         [command + "--max_steps 2 --resume_from_checkpoint " + change], 1,
         words + ("" if "cannot" in words else "; give the data and flags that the run began with"))
case("Resumed where no step is left",
     [command + "--max_steps 1 --resume_from_checkpoint " + name + "/checkpoint-1"
      for name, command in firsts.items()], 0,
     "is at step 1, the run has 1: no step is left to train")

grpo = "grpo --num_generations 2 --per_device_train_batch_size 4 --max_completion_length 4"
grpo += " --model_name_or_path m --reward_model_path rm --dataset_name prompts.jsonl"
grpo += " --quiet --output_dir out "
case("Steps beyond counting",
     grpo + "--num_iterations 1099511627776 --num_train_epochs 1e9", 1,
     "--num_train_epochs 1e+09: a run of ", "; at most 2^40 were expected")
if wanted("A checkpoint between two updates of a batch"):
    align(grpo + "--num_iterations 2 --max_steps 4 --save_steps 2 --output_dir first_grpo")
    state = os.path.join("first_grpo", "checkpoint-2", "trainer_state.json")
    altered = read(state).replace(b'"global_step": 2', b'"global_step": 1')
    write(state, altered)
case("A checkpoint between two updates of a batch",
     grpo + "--num_iterations 2 --max_steps 4 --resume_from_checkpoint first_grpo/checkpoint-2", 1,
     'trainer_state.json: "global_step" is 1, a multiple of --num_iterations (2) was expected')
lines("alike.jsonl", *({"text": "%s %d" % (good[i % 4], i), "score": 3} for i in range(220)))
case("Ratings that are all alike, said before stage 1", rlhf + "--dataset_name alike.jsonl", 1,
     "alike.jsonl: no two ratings differ by 1 or more")
case("A table longer than a page", "explain softmax --model_name_or_path m --prompt x --top_n 5000",
     1, "--top_n 5000: a table has 1000 rows at most")

# ---- the tokenizer
whole = read(os.path.join(os.path.dirname(program), "tokenizer.bin"))
case("No tokenizer.bin", generate + "--tokenizer nowhere.bin", 1, "nowhere.bin: No such file")
write("version1.bin", whole[:4] + struct.pack("<i", 1) + whole[8:])
case("llm.c's first tokenizer.bin", generate + "--tokenizer version1.bin", 1,
     "version1.bin: not a tokenizer.bin of version 2 (it starts with 20240328, 1)")
write("other.bin", b"\x80\x04" + whole[2:])
case("A file that is no tokenizer.bin", generate + "--tokenizer other.bin", 1, "other.bin")
write("half.bin", whole[: len(whole) // 2])
case("A tokenizer.bin that is cut short", generate + "--tokenizer half.bin", 1, "half.bin")
model("other_vocabulary")
write("other_vocabulary/vocab.json", json.dumps({"a": 0, "b": 1}))
case("A model with another vocabulary", generate + "--model_name_or_path other_vocabulary", 1,
     "other_vocabulary")
write("ids.txt", "1 2 300")
case("An id that the vocabulary has not", "tokenize --decode --vocab_size 300 ids.txt", 1,
     'ids.txt: number 3 ("300") is no id from 0 to 299')

# ---- numbers that break while training
for name, command in (
    ("sft", sft),
    ("dpo", dpo),
    ("reward", "reward --model_name_or_path m --dataset_name rated.jsonl" + short + "out "),
    ("ppo", ppo),
    ("reinforce", reinforce),
):
    case("A learning rate far too large: %s" % name, command + "--learning_rate 1e30 --max_steps 3",
         1, "%s: step " % name, "try a smaller --learning_rate", "the output of h.0.",
         "was the first to break")
case("The same with an adapter", sft + "--learning_rate 1e30 --max_steps 3 --use_peft", 1,
     "sft: step ", "the output of h.0.", "try a smaller --learning_rate")
case("Weights that are broken after the last step", sft + "--learning_rate 3e38 --weight_decay 100",
     1, "a weight that was to be saved is", "try a smaller --learning_rate")

# ---- the report
def without_page(what, command, status, *words):
    """A case for align alone in a folder, with tokenizer.bin but without docs."""
    if not wanted(what):
        return
    for name in (program, os.path.join(os.path.dirname(program), "tokenizer.bin")):
        shutil.copy(name, "alone")
    process = subprocess.run(
        ["alone/" + os.path.basename(program), *shlex.split(command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
    )
    said = last_line(process).replace("align: ", "", 1)
    result(what, problem_of(process, status, words), said)


os.makedirs("alone")
write("cut_log/trainer_state.json", '{"log_history": [')
write("cut_facts/trainer_state.json", '{"log_history": []}')
write("cut_facts/report.json", '{"facts": {"Command": "a')
case("A report of a folder without a log", "report nowhere", 1,
     "nowhere: no log of a run there (trainer_state.json); give the --output_dir of one")
case("A report of a log that is cut short", "report cut_log", 1,
     "cut_log/trainer_state.json: not JSON: it ends where a value was expected (byte 18)")
case("A report of a report.json that is cut short", "report cut_facts", 1,
     "cut_facts/report.json: not JSON: a string without its closing quote")
without_page("A report without docs/report.html", "report m", 1,
             "docs/report.html is neither beside the program nor in the current folder; run align "
             "in the folder it came in")
without_page("A report after a training without docs/report.html: a note", sft, 0,
             "align: note: docs/report.html is neither beside the program nor in the current "
             "folder: out/report.html is not written; report.json and the logs "
             "(trainer_state.json) are there")
write("docs/report.html", "<html></html>")
without_page("A report with a page that has no place for it", "report m", 1,
             "docs/report.html: no place for a run (<div ")
without_page("A report after a training, the same: a note", sft, 0,
             "align: note: docs/report.html: no place for a run (<div ", "is not written")
# fmt: on

# ---- disks: what was there stays whole, nothing half written stays, and the next run goes through
WRITES = ("writing failed: ", "cannot be written: ", "cannot be written to: ")
WRITES += ("No space left on device", "File too large", "File exists")
os.chmod(work, 0o755)


def limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def loads(folder):
    """None, or why a folder's model is no model: by align itself, checkpoints too."""
    below = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    for path in below[:]:
        if os.path.isdir(path):
            below += [os.path.join(path, name) for name in os.listdir(path)]
    for path in [folder] + below:
        if "tmp-" in path:
            return path + " is left"
        files = os.listdir(path) if os.path.isdir(path) else ()
        if "config.json" not in files and "adapter_config.json" not in files:
            continue
        process = align("next --prompt x --model_name_or_path " + path)
        if process.returncode:
            return "%s does not load: %s" % (path, last_line(process))
        for file in files:
            if file.endswith(".json"):
                json.loads(read(path + "/" + file))
            if file.endswith(".jsonl"):
                [json.loads(line) for line in read(path + "/" + file).splitlines()]
    return None


runs = ended = 0


def without_room(command, folder, more_room, again, **how):
    """A run that may find no room, then, with more room, another.

    Returns what is wrong, and whether the first run ended for lack of room.
    """
    global runs, ended
    process = align(command, **how)
    runs += 1
    short_of_room = process.returncode == 1
    ended += short_of_room
    problem, said = None, last_line(process)
    if process.returncode:
        problem = problem_of(process, 1, ())
    if short_of_room and not any(word in said for word in WRITES):
        problem = problem or "another message: " + said
    whole = any(name.startswith("checkpoint-") for name in os.listdir(folder))
    way_on = "is whole: --resume_from_checkpoint true goes on from it"
    if short_of_room and whole and way_on not in said:
        problem = problem or "the way on is not said: " + said
    problem = problem or loads(folder)
    if problem or not short_of_room:
        return problem, short_of_room
    more_room()
    process = align(again)
    runs += 1
    if process.returncode:
        return "the next run fails: " + last_line(process), True
    return loads(folder), True


def mount(kilobytes, more=""):
    command = "mount -t tmpfs -o size=%dk%s none disk" % (kilobytes, more)
    subprocess.run(command, shell=True, check=True)


def umount():
    subprocess.run("umount disk", shell=True)


def can_be_mounted():
    """Can this user mount a small disk here?"""
    if os.geteuid() != 0:
        return False
    os.makedirs("disk")
    try_it = "mount -t tmpfs -o size=64k none disk && umount disk"
    return subprocess.run(try_it, shell=True, capture_output=True).returncode == 0


def start_from(name, out):
    """Puts into the folder what it holds before the command `name` writes there."""
    if name in before:
        shutil.copytree(before[name], out)
    else:
        os.makedirs(out)


def kilobytes_of(folder):
    """What its files take, in pages of 4 kB."""
    return sum(-(-os.path.getsize(folder + "/" + f) // 4096) * 4 for f in os.listdir(folder))


steps = " --max_steps 3 --save_steps 1 "
writers = {
    "pretrain": pretrain + steps,
    "sft": sft + steps,
    "sft with LoRA": sft + steps + "--use_peft ",
    "reward": reward + steps,
    "dpo": dpo + steps,
    "ppo": ppo + steps,
    "reinforce": reinforce + steps,
    "merge": "merge --model_name_or_path adapter --output_dir out --quiet",
    "collect": collect + "--dataset_name many.jsonl ",
    "rlhf": rlhf,
}
# what the folder holds already
before = dict.fromkeys(("sft", "dpo", "ppo", "reinforce", "merge"), "m")
before.update(pretrain="wide", reward="rm")
model_bytes = os.path.getsize("m/model.safetensors")
sizes = [0, 10, 1000, 5000, model_bytes // 2, model_bytes - 1, int(1.5 * model_bytes)]
sizes.append(3 * model_bytes)
for name, command in writers.items():
    if not wanted("disk " + name):
        continue
    problems, failed_at = [], 0
    for size in sizes:
        shutil.rmtree("out", ignore_errors=True)
        start_from(name, "out")
        limited = {"preexec_fn": limit(size)}
        problem, ran_out = without_room(command, "out", lambda: None, command, **limited)
        failed_at += ran_out
        if problem:
            problems.append("at most %d bytes a file: %s" % (size, problem))
    if not failed_at:
        problems.append("no size was too small")
    what = "Files cannot grow (RLIMIT_FSIZE, 8 sizes): %s" % name
    said = "`PATH: writing failed: File too large; what was there before is untouched`"
    result(what, "; ".join(problems), said)

can_mount = can_be_mounted()
if not can_mount:
    print("skipped: a small disk (tmpfs) can be mounted by root alone")
for name, command in writers.items() if can_mount else ():
    if not wanted("disk " + name):
        continue
    problems, failed_at = [], 0
    command = command.replace("--output_dir out", "--output_dir disk/out")
    again = command + (" --resume_from_checkpoint true" if "save_steps" in command else "")
    used = 8 + (kilobytes_of(before[name]) if name in before else 0)

    def more_room():
        enlarge = "mount -o remount,size=%dk disk" % (used + 4000)
        subprocess.run(enlarge, shell=True, check=True)

    for extra in (0, 8, 24, 48, 100, 180, 300, 500, 2000):  # kB beside what is there
        mount(used + extra)
        try:
            start_from(name, "disk/out")
            problem, ran_out = without_room(command, "disk/out", more_room, again)
            failed_at += ran_out
            if problem:
                problems.append("%d kB free: %s" % (extra, problem))
        finally:
            umount()
    if not failed_at:
        problems.append("no size was too small")
    what = "A full disk (tmpfs, 9 sizes): %s" % name
    said = "`PATH: writing failed: No space left on device; what was there before is untouched`"
    result(what, "; ".join(problems), said)


def streams(what, commands, check, stdout=None, stderr=None, closed=(), **how):
    """check(process) -> a problem or None, for each command.

    stdout, stderr: where the streams go, or functions that open that; without them both are read.
    closed: the streams that are closed before the command begins.
    """
    if not wanted(what):
        return
    problems = []
    if closed:
        how["preexec_fn"] = lambda: [os.close(stream) for stream in closed]
    if stdout or stderr:
        how["capture_output"] = False
    for command in commands:
        shutil.rmtree("out", ignore_errors=True)
        for name, stream in (("stdout", stdout), ("stderr", stderr)):
            if stream:
                how[name] = stream() if callable(stream) else stream
        problem = check(align(command, **how))
        if problem:
            problems.append("`%s`: %s" % (command, problem))
    result(what, "; ".join(problems), "%d commands" % len(commands))


def said(word):
    return lambda process: problem_of(process, 1, (word,))


def trained(process):
    return ("exit status %d" % process.returncode) if process.returncode else loads("out")


def filtered(process):
    """A filter that nobody reads ends by the signal, without a word."""
    fine = process.returncode == -signal.SIGPIPE and not process.stderr
    return outcome(fine, "exit status %d" % process.returncode)


def saved_first(process):
    return said("standard output: writing failed: Broken pipe")(process) or loads("out")


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


def broken_pipe():
    r, w = os.pipe()
    os.close(r)
    return w


printing = [
    "tokenize texts.jsonl",
    "tokenize --jsonl texts.jsonl",
    "tokenize --decode --vocab_size 300 decode.txt",
    generate,
    generate + "--json",
    following,
    following + "--json",
    "logprob --model_name_or_path m --dataset_name texts.jsonl",
    "score --model_name_or_path rm --dataset_name texts.jsonl",
    "eval --model_name_or_path m --dataset_name texts.jsonl",
    "exact --vocab_size 2 --max_new_tokens 1 --json --quiet",
    "glossary",
    "glossary PPO",
    "--help",
    "sft --help",
    rlhf,
]
write("decode.txt", "1 2 3")
training = [pretrain, sft, reward, dpo, ppo, reinforce]
pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
# fmt: off
if os.path.exists("/dev/full"):
    streams("Standard output on a full disk", printing,
            said("standard output: writing failed: No space left on device"),
            stdout=full_disk, stderr=pipe)
    streams("Messages on a full disk: the training goes on", training, trained,
            stdout=nowhere, stderr=full_disk)
streams("Standard output is closed", printing, said("standard output: writing failed: "),
        closed=[1])
streams("Standard error is closed: the training goes on, nothing is written into its files",
        training, trained, closed=[2])
streams("All three streams are closed", training, trained, closed=[0, 1, 2])
streams("Nobody reads the messages any more: the training goes on", training, trained,
        stdout=nowhere, stderr=broken_pipe)
streams("Nobody reads the output any more: a filter ends without a word, as filters do",
        printing[:-1], filtered, stdout=broken_pipe, stderr=pipe)
streams("Nobody reads the output any more: rlhf saves its models first", printing[-1:],
        saved_first, stdout=broken_pipe, stderr=pipe)
# fmt: on


def shown(process):
    """What a person or a pipe gets: UTF-8 without control characters, whatever was drawn."""
    if process.returncode:
        return "exit status %d: %s" % (process.returncode, last_line(process))
    try:
        text = (process.stdout + process.stderr).decode()
    except UnicodeDecodeError as error:
        return str(error)
    control = [c for c in text if ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160]
    return "control characters: %r" % control if control else None


wild = generate + "--do_sample --temperature 8 --top_k 0 --num_return_sequences 8"
wild = [wild + " --max_new_tokens 30 --seed %d" % seed for seed in range(3)]
streams("Tokens that are no text, written", wild + [following + "--top_n 300"], shown)
wild = (
    "collect --model_name_or_path m --dataset_name prompts.jsonl --output_dir out --temperature 8"
)
wild += " --max_new_tokens 30 --quiet"
judge = {"stdin": None, "input": b"1\n2\n1\n"}
streams("Tokens that are no text, shown to be judged", [wild], shown, **judge)

write("a_file", "x")
words = "a_file: is a file, a folder was expected"
case("output_dir is a file", [c + "--output_dir a_file" for c in (sft, collect, ppo)], 1, words)
case("output_dir is inside a file", sft + "--output_dir a_file/out", 1, words)
if can_mount and wanted("output_dir read-only"):
    what = "output_dir on a read-only disk: found before the training"
    commands = [c + "--output_dir disk" for c in (sft, ppo, rlhf, collect)]
    mount(64, ",ro")
    try:
        case(what, commands, 1, "disk: cannot be written to: Read-only file system")
    finally:
        umount()
# ---- a program that judges

bare = " --model_name_or_path m --dataset_name prompts.jsonl"
judges = [c + bare + o + "--quiet --max_new_tokens 4 " for c, o in (
    ("eval", " "),
    ("generate", " --do_sample --best_of 2 "),
    ("collect", " --output_dir out "))]
judges += [c + bare + once for c in ("ppo --mini_batch_size 2", "reinforce")] + [rlhf]


def judge(name, script):
    """A program of the shell; returns the flag that names it."""
    os.makedirs("jury", exist_ok=True)
    write("jury/" + name, "#!/bin/sh\n" + script + "\n")
    os.chmod("jury/" + name, 0o755)
    return '--reward_command "jury/%s" ' % name


good_judge = judge("good", "while read -r line; do echo ${#line}; done")
case("A program that judges", [c + good_judge for c in judges], 0)
case("A program that judges and gives no score",
     [c + judge("null", "while read -r line; do echo null; done") for c in judges[:-1]], 0)
case("A program that gives every answer the same score in rlhf",
     [rlhf + judge("same", "while read -r line; do echo %s; done" % x) for x in ("null", "7")], 1,
     "no two of the language model's answers to a prompt could be told apart",
     "--reward_command must give one of them a higher number")
judge("Ana's $(good) \u00e4 judge", "while read -r line; do echo $1 1; done")
for what, command in (
    ("a path with blanks, quotes and umlauts", "\"jury/Ana's $(good) \u00e4 judge\""),
    ("the same, quoted, with words", """ '"jury/Ana'"'"'s $(good) \u00e4 judge" -' """),
):
    words = ("line 1 (of 3 answers) is no JSON: \"- 1\"",) if "words" in what else ()
    case("A program with " + what, judges[0] + "--reward_command " + command, bool(words), *words)
case("A program that exits with an error", [c + judge("exit", "echo why >&2; exit 3")
                                            for c in judges], 1,
     "--reward_command jury/exit: ended with exit status 3, 0 was expected; what it said is above")
for what, script, *words in (
    ("writes too few lines", "echo 1; echo 2",
     "wrote 2 lines for 3 answers; a number or null was expected for each"),
    ("writes nothing", "cat > /dev/null", "wrote 0 lines for 3 answers"),
    ("writes too many lines", "yes 1", "wrote more than 3 lines for 3 answers, and was ended"),
    ("writes a word", "echo 1; echo good; echo 1",
     'line 2 (of 3 answers) is no JSON: "good"; a number or null was expected'),
    ("writes a string", "echo 1; echo 1; echo '\"1\"'", 'line 3 (of 3 answers) is other JSON: "'),
    ("writes a list", "echo '[1, 2, 3]'; echo; echo", 'line 1 (of 3 answers) is other JSON: "[1'),
    ("writes NaN", "echo NaN; echo 1; echo 1", 'line 1 (of 3 answers) is no JSON: "NaN"'),
    ("writes infinity", "echo inf; echo 1; echo 1", 'line 1 (of 3 answers) is no JSON: "inf"'),
    ("writes a huge number", "echo 1e39; echo 1; echo 1", "is a number beyond 3.4e38"),
    ("writes a decimal comma", "echo 0,5; echo 1; echo 1", "is no JSON: \"0,5\""),
    ("writes an empty line", "echo; echo 1; echo 1", "line 1 (of 3 answers) is an empty line"),
    ("writes control characters", "printf '\\033[2J\\n1\\n1\\n'", 'is no JSON: "?[2J"'),
    ("writes a long line", "head -c 5000 /dev/zero | tr '\\0' x; echo; echo 1; echo 1",
     'is no JSON: "' + 60 * "x" + '..."'),
    ("writes an endless line", "cat /dev/zero", "line 1 has no end within 65536 bytes"),
    ("is ended by a signal", "kill -9 $$", "was ended by signal 9 (Killed)"),
    ("never ends", "sleep 1000", "was still running after 0.5 seconds, and was ended",
     "give it more (--reward_timeout) or smaller batches"),
    ("never ends, nor do its children", "sleep 1000 & sleep 1000", "after 0.5 seconds"),
    ("closes its output and never ends", "exec 1>&-; sleep 1000", "after 0.5 seconds"),
    ("reads for ever", "cat > /dev/null; cat /dev/zero > /dev/null", "after 0.5 seconds"),
):
    case("A program that " + what, judges[0] + "--reward_timeout 0.5 " + judge("wrong", script), 1,
         "--reward_command jury/wrong: ", *words)
write("jury/plain.py", "print(1)")
os.makedirs("jury/folder", exist_ok=True)
write("jury/nonsense", "no program\n")
os.chmod("jury/nonsense", 0o755)
case("A program that is not there", [c + "--reward_command jury/nowhere" for c in judges], 1,
     "--reward_command: jury/nowhere: No such file or directory")
case("A program that is not in PATH", judges[0] + "--reward_command 'no-such-judge 1'", 1,
     '--reward_command: there is no program "no-such-judge" in PATH')
case("A program without permission", [judges[0] + "--reward_command jury/plain.py",
                                      judges[0] + "--reward_command jury/folder"], 1,
     "is no program that may be run; chmod +x it, or name what runs it")
case("A program of no known format", judges[0] + "--reward_command jury/nonsense", 1,
     "--reward_command jury/nonsense: cannot be run: Exec format error")
case("A command line with an open quote", judges[0] + """--reward_command "python3 'x.py" """, 1,
     "--reward_command: a quote ' is not closed")
case("Weights of two judges that are none",
     [judges[0] + good_judge + "--reward_model_path rm --reward_weights " + w
      for w in ("1", "1 2 3", "1 x", "nan 1")], 2,
     "two numbers were expected, the reward model's weight and the program's")
case("Weights and one judge", judges[0] + good_judge + "--reward_weights 1 2", 0,
     "note: --reward_weights: no effect: there is only one judge")
case("Two judges", [judges[0] + good_judge + "--reward_model_path rm --reward_weights 1 0.5",
                    rlhf + good_judge + "--reward_weights 1 -2"], 0)
case("A time for a program, and no program", judges[0] + "--reward_model_path rm "
     "--reward_timeout 5", 0, "note: --reward_timeout: no effect: there is no --reward_command")
case("The best of several without a judge", generate + "--do_sample --best_of 4", 2,
     "--best_of: which is the best? --reward_model_path, or --reward_command, is needed")
case("The best of several that are the same", generate + "--best_of 4 --reward_model_path rm", 1,
     "--best_of 4: without --do_sample all of them would be the same")
case("The best of several beams",
     [generate + "--best_of 4 --do_sample --reward_model_path rm " + f
      for f in ("--num_beams 2", "--num_return_sequences 2")], 1,
     "it keeps one of several samples; leave out --num_beams and --num_return_sequences")
case("A judge without --best_of", generate + "--reward_model_path rm", 0,
     "note: --reward_model_path: no effect: without --best_of nothing is judged")
case("Numbers of answers that are none", [judged + "--best_of " + n for n in ("0", "x", "1,5000")],
     2, "up to 16 whole numbers from 1 to 4096 were expected")


def is_running(pid):
    """Not ended: an ended process stays in the list until its parent, by now init, takes notice."""
    try:
        return read("/proc/%d/stat" % pid).rsplit(b")", 1)[1].split()[0] != b"Z"
    except FileNotFoundError:
        return False


def one_signal(command, number, times):
    """Ends a command while its program judges; returns what is left of the program."""
    shutil.rmtree("out", ignore_errors=True)
    script = "echo $$ > jury/pid; sleep 1.5 & echo $! >> jury/pid; cat > /dev/null; wait; yes 1"
    if os.path.exists("jury/pid"):
        os.remove("jury/pid")
    words = [program] + shlex.split(command + judge("slow", script + " | head -n 4"))
    # a background job of a shell, as this may be, ignores Ctrl-C, and so would its children
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env=environment,
                               stdout=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    end = time.time() + 30
    while not (os.path.exists("jury/pid") and len(read("jury/pid").split()) == 2):
        if time.time() > end:
            return "the program was not started"
        time.sleep(0.01)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.1)
    said = process.communicate(timeout=30)[1].decode("utf-8", "replace")
    time.sleep(0.5)
    left = [pid for pid in read("jury/pid").split() if is_running(int(pid))]
    if left:
        return "still there: %s" % left
    return process.returncode, said


if wanted("Ctrl-C while a program judges"):
    run = judges[3].replace("--max_steps 1", "--max_steps 3") + "--save_steps 0 "
    for what, command, number, times, status in (
        ("eval", judges[0], signal.SIGINT, 1, -signal.SIGINT),
        ("ppo, twice", run, signal.SIGINT, 2, -signal.SIGINT),
        ("ppo, SIGHUP", run, signal.SIGHUP, 1, -signal.SIGHUP),
        ("ppo, once", run, signal.SIGINT, 1, 1),
    ):
        came = one_signal(command, number, times)
        right = came[0] == status and ("interrupted after step 1 of 3" in came[1] or status != 1)
        result("Ctrl-C while a program judges: " + what, outcome(right, str(came)))

os.makedirs("locked", 0o555)
os.chmod("locked", 0o555)
if wanted("output_dir of somebody else"):
    drop = {"preexec_fn": lambda: os.setuid(65534)} if os.geteuid() == 0 else {}
    process = align(sft + "--output_dir locked", **drop)
    below = align(sft + "--output_dir locked/out", **drop)
    problem = problem_of(below, 1, ("locked/out: Permission denied",))
    result("output_dir in a folder without permission", problem)
    problem = problem_of(process, 1, ("locked: cannot be written to: Permission denied",))
    message = last_line(process).replace("align: ", "", 1)
    result("output_dir without permission: found before the training", problem, message)


def pasted(folder):
    """Runs rlhf and pastes the lines that it prints into a shell.

    From a folder and into one with an awkward name.
    """

    def run(line):
        env = {**environment, "A": folder + "/align it"}
        words = ["sh", "-c", line]
        return subprocess.run(words, capture_output=True, env=env, stdin=subprocess.DEVNULL)

    def reported():
        return json.loads(read("Ana's $run/report.json"))["facts"]["Command"]

    os.makedirs(folder)
    os.symlink(program, folder + "/align it")
    first = run('"$A" ' + rlhf.replace("--output_dir out", "") + '--output_dir "Ana\'s \\$run"')
    printed = first.stdout.decode("utf-8", "replace").split("\n")
    line = next((line for line in printed if " generate " in line), None)
    if not line:
        return "no line to paste: " + last_line(first)
    tried = run(line)
    if tried.returncode or not tried.stdout.startswith(b"The film is"):
        return "`%s`: %s" % (line, last_line(tried))
    command = reported()
    again = run(command)
    same = again.returncode == 0 and reported() == command
    return outcome(same, "`%s`: %s" % (command, last_line(again)))


if wanted("pasted"):
    result("Lines that are printed can be pasted into a shell", pasted("Ana's tools"))
shutil.rmtree(work, ignore_errors=True)
if runs and not arguments.table:
    print(
        "%d runs without room, %d of them ended with one line;" % (runs, ended),
        "every model and checkpoint they left loads",
    )
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed > 0)
