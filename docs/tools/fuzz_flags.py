"""Command lines for align, thousands of them, under the address and undefined-behaviour sanitizers.

    python3 docs/tools/fuzz_flags.py [--count 2000] [--seed 1] [--limit 20] [--cc cc] [--show]

Every flag of every command meets every kind of value, in every spelling, beside a few other flags:
extremes, empty and huge values, wrong kinds, files where folders belong, flags of other commands
and programs. About one line in three is complete and trains, generates or measures, with models of
one layer and --max_steps 1. Each must end within --limit seconds of processor time with status 0, 1
or 2; a refusal (1, 2) says one line that begins with "align: ", whatever notes came before; and the
sanitizers must find nothing.

align is built with a driver around it that reads command lines from standard input and runs each in
a fork, so that a line costs a few milliseconds and not the start of a sanitized program. Models and
data are made in a temporary folder, which is the current one of every run. A line that fails is
printed as a shell takes it. Ends with 'N passed, N failed'.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time

arguments = argparse.ArgumentParser()
arguments.add_argument("--count", type=int, default=2000)
arguments.add_argument("--seed", type=int, default=1)
arguments.add_argument(
    "--limit", type=int, default=20, help="seconds of processor time that one line may take"
)
arguments.add_argument("--cc", default="cc")
arguments.add_argument("--show", action="store_true", help="print every line with its status")
arguments = arguments.parse_args()
root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
work = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)

# A request: its length in 4 bytes, then the arguments with a NUL behind each. An answer: the status
# as waitpid has it and the length of what was said on standard error, 4 bytes each, and what was
# said. A line that the parser refuses is answered by the driver itself, whose exit comes back; any
# other runs in a fork, which a signal ends if it takes too long.
DRIVER = r"""
#include <stdlib.h>
static _Noreturn void leave(int status);
#define exit(status) leave(status)
#define main align_main
#include "%s/align.c"
#undef main
#undef exit
#include <setjmp.h>
#include <sys/wait.h>
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
    return "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1000";
}

static jmp_buf refusal;
static bool parsing;
static int refused_with;

static _Noreturn void leave(int status) {
    if (!parsing) exit(status);
    refused_with = status;
    longjmp(refusal, 1);
}

/* 0, or the status with which the parser refuses the line. */
static int parse_line(int argc, char **argv) {
    static struct Options o;
    o = (struct Options){0};
    parsing = true;
    if (setjmp(refusal) == 0) {
        refused_with = 0;
        const struct Command *command = find_command(argv[1]);
        o = default_options(command->name);
        parse_arguments(&o, command, argc, argv);
    }
    parsing = quiet = false;
    options_close(&o);
    return refused_with;
}

static int run_line(int argc, char **argv, int said, unsigned limit) {
    bool about = argc < 2 || argv[1][0] == '-' || strcmp(argv[1], "help") == 0;
    int refused = about ? 0 : parse_line(argc, argv);
    if (refused) return refused << 8;
    if (ftruncate(said, 0) != 0) return 1;
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_RDWR);
        dup2(null, 0);
        dup2(null, 1);
        setrlimit(RLIMIT_CPU, &(struct rlimit){limit, limit});
        alarm(10 * limit); /* the machine may be busy; or the line waits for what never comes */
        exit(align_main(argc, argv));
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status;
}

static bool read_all(void *to, size_t n) { return fread(to, 1, n, stdin) == n; }

static bool read_line(char *words, size_t room, uint32_t *length) {
    return read_all(length, 4) && *length < room && read_all(words, *length);
}

int main(int count, char **given_to_driver) {
    static char words[1 << 20], text[1 << 16];
    int said = open(given_to_driver[2], O_RDWR | O_CREAT | O_APPEND, 0600);
    dup2(said, 2);
    uint32_t length = 0;
    while (count > 2 && read_line(words, sizeof words, &length)) {
        char *argv[512] = {0};
        int argc = 0;
        for (char *word = words; word < words + length && argc < 511; word += strlen(word) + 1)
            argv[argc++] = word;
        if (ftruncate(said, 0) != 0) return 1;
        int32_t answer[2] = {run_line(argc, argv, said, (unsigned)atoi(given_to_driver[1])), 0};
        ssize_t n = pread(said, text, sizeof text, 0);
        answer[1] = (int32_t)n;
        fwrite(answer, 4, 2, stdout);
        fwrite(text, 1, (size_t)n, stdout);
        fflush(stdout);
    }
    return 0;
}
""" % root


class Driver:
    def __init__(self):
        with open(work + "/driver.c", "w") as file:
            file.write(DRIVER)
        shutil.copy(root + "/tokenizer.bin", work)
        flags = "-std=gnu11 -g -O1 -w -fsanitize=address,undefined -fno-sanitize-recover=all"
        files = [work + "/driver.c", "-o", work + "/driver", "-lm"]
        subprocess.run([arguments.cc, *flags.split(), *files], check=True)
        os.mkdir(work + "/run")
        self.start()

    def start(self):
        environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [work + "/driver", str(arguments.limit), work + "/said"],
            cwd=work + "/run",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def run(self, words):
        """(status as waitpid has it, what was said on standard error)"""
        line = b"".join(os.fsencode(word) + b"\0" for word in ["align", *words])
        self.process.stdin.write(struct.pack("<I", len(line)) + line)
        self.process.stdin.flush()
        answer = self.process.stdout.read(8)
        if len(answer) < 8:  # the parser ended the driver: a finding
            status = self.process.wait()
            self.start()
            with open(work + "/said", errors="replace") as file:
                return (-status if status < 0 else status << 8), file.read()
        status, length = struct.unpack("<ii", answer)
        return status, self.process.stdout.read(length).decode("utf-8", "replace")


def lines(name, *rows):
    with open(work + "/run/" + name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def prepare(driver):
    """Models and data, in the folder where the lines run."""
    texts = ["The film is good.", "It was bad, so bad that I left.", "A fine story."]
    texts.append("Nothing in it is new.")
    pairs = [("It is", " good", " bad"), ("A", " b", " c")]
    lines("texts.jsonl", *({"text": text} for text in texts))
    lines("prompts.jsonl", {"prompt": "The film"}, {"prompt": "It"})
    lines("pairs.jsonl", *({"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs))
    rated = ({"text": "%s %d" % (texts[i % 4], i), "score": i % 5} for i in range(210))
    lines("rated.jsonl", *rated)
    lines("labelled.jsonl", *({"text": text, "label": i % 2} for i, text in enumerate(texts)))
    rollouts = ({"query_ids": [1, 2], "response_ids": [3, 4], "score": i} for i in range(4))
    lines("rollouts.jsonl", *rollouts)
    with open(work + "/run/ids.txt", "w") as file:
        file.write("1 2 3\n")
    shape = "--n_layer 1 --n_embd 8 --n_head 2 --vocab_size 300"
    for line in (
        "pretrain --dataset_name texts.jsonl --output_dir m --n_positions 32 " + shape,
        "pretrain --dataset_name texts.jsonl --output_dir m48 --n_positions 48 " + shape,
        "reward --dataset_name rated.jsonl --output_dir rm --model_name_or_path m",
        "sft --dataset_name texts.jsonl --output_dir adapter --model_name_or_path m"
        " --use_peft --lora_r 2",
    ):
        status, said = driver.run(line.split() + ["--max_steps", "1", "--quiet"])
        assert status == 0, said


# Command lines that are complete, and end soon: of each command, what stands behind its name.
M, RM, PROMPTS = "--model_name_or_path m", "--model_name_or_path rm", "--dataset_name prompts.jsonl"
TEXTS, PAIRS = "--dataset_name texts.jsonl", "--dataset_name pairs.jsonl"
RATED, LABELLED = "--dataset_name rated.jsonl", "--dataset_name labelled.jsonl"
SHAPE = "--n_layer 1 --n_embd 8 --n_head 2 --n_positions 32 --vocab_size 300"
STEPS = "--pretrain_steps 1 --reward_steps 1 --ppo_steps 0 --dpo_steps 0"
TRAIN, REWARD = "--max_steps 1 --output_dir out --quiet", "--reward_model_path rm"
TRAIN_LORA = "--max_steps 1 --output_dir out_lora --quiet"
POLICY = f"{PROMPTS} {REWARD} --batch_size 2 --output_max_length 5"
COMPLETE = {
    "rlhf": [f"--model_name_or_path m48 {RATED} {STEPS} --output_dir out --quiet"],
    "tokenize": ["texts.jsonl", "--jsonl texts.jsonl", "--decode ids.txt --vocab_size 300"],
    "pretrain": [f"{TEXTS} {SHAPE} {TRAIN}", f"{TEXTS} {M} {TRAIN}"],
    "sft": [f"{M} {TEXTS} {TRAIN}", f"{M} {TEXTS} --use_peft --lora_r 2 {TRAIN_LORA}"],
    "reward": [f"{M} {PAIRS} {TRAIN}", f"{M} {LABELLED} --loss_type bce {TRAIN}"],
    "ppo": [
        f"{M} --mini_batch_size 2 {POLICY} {TRAIN}",
        f"{M} --rollouts rollouts.jsonl --batch_size 4 --mini_batch_size 2 {TRAIN}",
    ],
    "reinforce": [f"{M} {POLICY} {TRAIN}"],
    "dpo": [f"{M} {PAIRS} {TRAIN}", f"{M} {PAIRS} --peft_adapter adapter {TRAIN_LORA}"],
    "exact": ["--vocab_size 99"],
    "generate": [
        f"{M} --prompt x --max_new_tokens 3",
        f"{M} {PROMPTS} --do_sample --max_new_tokens 3",
    ],
    "next": [f"{M} --prompt x"],
    "logprob": [f"{M} {TEXTS}"],
    "score": [f"{RM} {TEXTS}"],
    "collect": [f"{M} {REWARD} {PROMPTS} --max_new_tokens 3 --output_dir out --quiet"],
    "eval": [f"{M} {TEXTS}", f"{RM} {RATED}", f"{M} {REWARD} {PROMPTS} --max_new_tokens 3"],
    "merge": [f"{M} --peft_adapter adapter --output_dir out"],
    "report": ["m"],
    "glossary": ["KL"],
}

# fmt: off
NUMBERS = [
    "0", "1", "2", "3", "7", "-1", "-0", "+1", "0.5", "1e-3", "0.999999999999", "1.5", "1e9",
    "1e38", "3.5e38", "1e39", "-1e39", "1e308", "1e309", "1e-38", "1e-45", "1e-320", "nan", "-nan",
    "inf", "-inf", "0x10", "1e", "1_000", " 5", "5 ", "٣", "255", "256", "4096", "4097", "65535",
    "65536", "65537", "2147483647", "2147483648", "4294967295", "4294967296", "4294967297",
    "1099511627776", "1099511627777", "9007199254740993", "9223372036854775807",
    "9223372036854775808", "18446744073709551615", "18446744073709551616", "9" * 400,
    "0" * 400 + "1",
]
WORDS = [
    "", " ", ",", "true", "False", "yes", "0", "never", "None", "[]", "{}", "x", "-", "-h", "--",
    "--quiet", "=", "a=b", "a b", "Ana's", "%s%n%d", "\\", "\x1b[2J", "\n", "é日😀", "\x7f",
    "a" * 300, "a" * 5000, "a/" * 3000, "texts.jsonl", "m", "rm", "m48", "adapter", "nowhere",
    "m/config.json", "/dev/null", "rollouts.jsonl", "prompts.jsonl", "pairs.jsonl", "rated.jsonl",
    "labelled.jsonl", "linear", "cosine", "constant", "sgd", "adamw_torch", "sigmoid", "ipo",
    "hinge", "robust", "sft", "bce", "sigmoid sft", "sigmoid,sigmoid", "kl", "abs", "mse", "full",
    "none", "mean", "rloo", "sequential", "all-linear", "c_attn", "c_fc c_proj", "h.0", "wte",
    "1 0.2", "0", "1e39 1", "nan",
]
FOLDERS = [  # for what is written
    "out", "out", "out", "out2", "m/config.json", "out/a/b", "", " ", "/dev/null/x", "/proc/x",
    "a" * 300, "a" * 5000, "Ana's %s", "é",
]
FOREIGN = [
    "bf16", "fp16", "tf32", "report_to", "eval_strategy", "save_strategy", "packing", "do_train",
    "logging_dir", "load_best_model_at_end", "lr", "epochs", "max_tokens", "model", "model_name",
    "steps", "kl_coef", "n_ctx", "no_", "no_quiet", "no_json", "no_use_peft", "", "-", "=",
    "a" * 100, "é", "%n",
]
LONG = {
    "max_steps", "num_train_epochs", "pretrain_steps", "reward_steps", "ppo_steps", "dpo_steps",
    "ppo_epochs", "gradient_accumulation_steps", "batch_size", "num_generations",
    "num_return_sequences", "n_layer", "n_embd", "lora_r",
}
SHORT = [
    "0", "1", "2", "3", "-1", "-2", "0.5", "1e99", "nan", "inf", "x", "", "18446744073709551616",
    "1099511627777",
]
# fmt: on
# Values that fit, by how a flag's description in --help begins.
FITTING = [
    ("true or false", ["true", "false", "True", "no"]),
    (
        "a whole number",
        ["0", "1", "2", "3", "5", "16", "31", "32", "100", "4096", "65536", "1099511627776"],
    ),
    ("a number from 0 to", ["0", "0.1", "0.5", "0.9", "0.99999999", "1"]),
    ("a number", ["0", "0.1", "0.5", "1", "2", "1e-6", "1e-3", "1000", "1e9", "1e38", "1e-38"]),
]


def flags_of():
    """({command: [its flags]}, {flag: values that fit}), as --help has them.

    It is that of an align without sanitizers.
    """
    program = work + "/align"
    build = [arguments.cc, "-O1", "-w", root + "/align.c", "-o", program, "-lm"]
    subprocess.run(build, check=True)
    flags, fitting = {}, {}
    for command in COMPLETE:
        told = subprocess.run([program, command, "--help"], capture_output=True, check=True)
        page = told.stdout.decode()
        found = re.findall(r"^  --(\w+) +(?:\[[^]]*\] )?(.*)", page, re.M)
        flags[command] = [flag for flag, text in found]
        for flag, text in found:
            names = re.findall(r"\w+", text) if re.fullmatch(r"(\w+, )+\w+", text) else WORDS
            fit = (values for start, values in FITTING if text.startswith(start))
            fitting[flag] = next(fit, names)
    return flags, fitting


class Lines:
    """Command lines, one after the other.

    Every flag of every command comes with a value of each kind in turn.
    """

    def __init__(self, flags, fitting, seed):
        self.flags, self.fitting, self.random = flags, fitting, random.Random(seed)
        self.turn = [(command, flag) for command in flags for flag in flags[command]]
        self.all = sorted({flag for names in flags.values() for flag in names})
        self.at = len(self.turn)

    def value(self, flag, complete):
        """A value for a flag; where the line is complete, none that would rightly run for long."""
        r = self.random
        if flag == "output_dir":
            return r.choice(FOLDERS)
        if complete and flag in LONG:
            return r.choice(SHORT[:4] if r.random() < 0.8 else SHORT)
        if complete and r.random() < 0.8:
            return r.choice(self.fitting.get(flag, WORDS))
        kind = r.random()
        if kind < 0.5:
            return r.choice(NUMBERS)
        if kind < 0.93:
            return r.choice(WORDS)
        letters = (
            [r.randrange(1, 128), r.randrange(0xA0, 0x3000)] for _ in range(r.randrange(1, 20))
        )
        return "".join(chr(r.choice(two)) for two in letters)

    def spelt(self, flag, complete):
        """A flag and its value as arguments, in one of the ways to write them."""
        r = self.random
        name = flag
        if r.random() < 0.1:
            name = name.replace("_", "-")
        if r.random() < (0.03 if complete else 0.1):
            name = name[: r.randrange(1, len(name) + 1)] if name else name
        if r.random() < (0.01 if complete else 0.05):
            name = "no_" + name
        if r.random() < (0.01 if complete else 0.03) and name:
            name = name.replace(r.choice(name), "", 1)
        value = self.value(flag, complete)
        way = r.random()
        if way < 0.3:
            return ["--%s=%s" % (name, value)]
        if way < (0.33 if complete else 0.4):
            return ["--" + name]
        if way < 0.97:
            return ["--" + name, value]
        return ["--" + name, value, self.value(flag, complete)]

    def next(self):
        r = self.random
        if self.at == len(self.turn):
            r.shuffle(self.turn)
            self.at = 0
        command, flag = self.turn[self.at]
        self.at += 1
        complete = r.random() < 0.35 or command in ("exact", "rlhf")
        behind = shlex.split(r.choice(COMPLETE[command])) if complete else []
        words = [command]
        others = r.choice([0, 0, 1, 1, 2, 4])
        for name in [flag] + [r.choice(self.flags[command]) for _ in range(others)]:
            words += self.spelt(name, complete)
        if r.random() < (0.03 if complete else 0.1):
            words += self.spelt(r.choice(FOREIGN + self.all), complete)
        if r.random() < 0.02:
            words.append(r.choice(WORDS))
        if r.random() < 0.01:
            no_command = [command[:-1], command + "x", ""]
            words[0] = r.choice(no_command + ["--help", "-h", "help", "--version", "é"])
        if command == "exact" or r.random() < 0.2:
            return words + behind  # the last word counts
        return words[:1] + behind + words[1:]


def problem_of(status, said):
    """None, or what is wrong with how a line ended."""
    if os.WIFSIGNALED(status):
        return "ended by signal %d" % os.WTERMSIG(status)
    if os.WEXITSTATUS(status) not in (0, 1, 2):
        return "exit status %d" % os.WEXITSTATUS(status)
    if "runtime error" in said or "Sanitizer" in said:
        return "a finding of a sanitizer"
    if status == 0:
        return None
    errors = [line for line in said.split("\n") if line and not line.startswith("align: note: ")]
    if not said.endswith("\n") or not errors:
        return "nothing was said"
    if said.startswith("align: train and align"):
        return None  # no command: the list of them
    progress = re.compile(r"(\d/4 )?\w[\w ]*: |saved to |ppo|dpo|\d+ rated")
    *before, last = errors
    fine = all(progress.match(line) and not line.startswith("align: ") for line in before)
    if not last.startswith("align: ") or not fine:
        return "one line that begins with 'align: ' was expected"
    return None


def main():
    driver = Driver()
    prepare(driver)
    made = Lines(*flags_of(), arguments.seed)
    counts, failed, begin = {}, 0, time.monotonic()
    for number in range(arguments.count):
        words = made.next()
        words = [word.replace("\0", "") for word in words]
        for folder in ("out", "out2", "out_lora"):
            shutil.rmtree(work + "/run/" + folder, ignore_errors=True)
        status, said = driver.run(words)
        problem = problem_of(status, said)
        if arguments.show:
            print(status, shlex.join(words), "|", said.strip()[:200])
        key = os.WEXITSTATUS(status) if os.WIFEXITED(status) else "signal"
        counts[key] = counts.get(key, 0) + 1
        if not problem:
            continue
        failed += 1
        line, said = shlex.join(words)[:1000], said.strip()[:1500]
        print("FAILED align %s\n    %s: %s" % (line, problem, said), flush=True)
    ended = tuple(counts.get(k, 0) for k in (0, 1, 2))
    each = 1000 * (time.monotonic() - begin) / arguments.count
    said = "done %d, could not be done %d, wrong usage %d; %.1f ms a line"
    print(said % (*ended, each))
    print("%d passed, %d failed" % (arguments.count - failed, failed))
    return failed > 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(work, ignore_errors=True)
