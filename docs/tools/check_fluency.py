#!/usr/bin/env python3
"""check_fluency.py [OUT [REVIEWS]]: do the samples of `align rlhf` read like English? OUT is the
folder of a run (out), REVIEWS the rated texts it learnt from (docs/reviews.jsonl).

Three measures, all on the tenth of the reviews that the run held out (by the seed of its command):
  bits a character   the language model's loss on them: two vocabularies can be compared
  real words         the share of written words that occur twice or more in the reviews learnt from
  held-out pairs     the share of pairs of adjacent words that occur in a held-out review
The line `people` is what real sentences reach. A policy that repeats what is common scores higher
in the second share: read it with distinct-2 beside it.

Exit 1 if a prompt ends inside a word, or if of the language model's words fewer than 85 % are real
ones. Python 3 alone; bits a character needs ./align."""
import collections
import json
import math
import os
import re
import subprocess
import sys

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
MASK = 2**64 - 1


def words(text):
    return [word.lower() for word in WORD.findall(text)]


def rotate_left(x, k):
    return (x << k | x >> (64 - k)) & MASK


def shuffled(n, seed, stream=4):
    """align.c's rng_shuffle of 0 ... n - 1 with rng_seed(seed, STREAM_SPLIT): xoshiro256++."""
    state = seed ^ (stream * 0xD1342543DE82EF95 & MASK)
    s = []
    for _ in range(4):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        s.append(z ^ (z >> 31))
    order = list(range(n))
    for i in range(n, 1, -1):
        number = (rotate_left((s[0] + s[3]) & MASK, 23) + s[0]) & MASK
        t = s[1] << 17 & MASK
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= t
        s[3] = rotate_left(s[3], 45)
        j = (number >> 32) * i >> 32
        order[i - 1], order[j] = order[j], order[i - 1]
    return order


def json_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def shares(texts, known, pairs_known):
    """Real words, held-out pairs, and distinct-2 of some texts."""
    lists = [words(text) for text in texts]
    every = [word for row in lists for word in row]
    pairs = [pair for row in lists for pair in zip(row, row[1:])]
    return (sum(word in known for word in every) / max(1, len(every)),
            sum(pair in pairs_known for pair in pairs) / max(1, len(pairs)),
            len(set(pairs)) / max(1, len(pairs)))


def bits_a_character(out, held_out):
    """Loss times tokens over characters; a text's end is a token and a character."""
    with open(os.path.join(out, "summary.json"), encoding="utf-8") as file:
        nats = json.load(file)["language_model"]["eval_loss_after"]
    with open(os.path.join(out, "language_model", "config.json"), encoding="utf-8") as file:
        size = json.load(file)["vocab_size"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in held_out)
    command = ["./align", "tokenize", "--jsonl", "--vocab_size", str(size)]
    ids = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout
    tokens = sum(len(json.loads(line)["input_ids"]) + 1 for line in ids.splitlines())
    return nats * tokens / sum(len(text) + 1 for text in held_out) / math.log(2)


def cut_prompts(samples, held_out):
    """Prompts that no held-out review begins with, or only so that it goes on inside a word."""
    return [row["prompt"] for row in samples
            if not any(text.startswith(row["prompt"]) and text[len(row["prompt"])].isspace()
                       for text in held_out if len(text) > len(row["prompt"]))]


def main():
    out = sys.argv[1] if len(sys.argv) > 1 else "out"
    reviews = sys.argv[2] if len(sys.argv) > 2 else "docs/reviews.jsonl"
    with open(os.path.join(out, "report.json"), encoding="utf-8") as file:
        command = json.load(file)["facts"]["Command"]
    seed = re.search(r"--seed[ =](\d+)", command)
    texts = [row["text"] for row in json_lines(reviews)]
    order = shuffled(len(texts), int(seed.group(1)) if seed else 42)
    held_out = [texts[i] for i in order[:len(texts) // 10]]
    learnt = [texts[i] for i in order[len(texts) // 10:]]
    samples = json_lines(os.path.join(out, "samples.jsonl"))

    counts = collections.Counter(word for text in learnt for word in words(text))
    known = {word for word, n in counts.items() if n > 1}
    pairs = {pair for text in held_out for pair in zip(words(text), words(text)[1:])}
    bits = bits_a_character(out, held_out)
    print(f"bits a character on {len(held_out)} held-out reviews: {bits:.3f}")
    print(f"{len(samples)} samples    real words  held-out pairs  distinct-2")
    # as many people's sentences as there are samples: distinct-2 falls with the number of texts
    written = {"people": learnt[:len(samples)]}
    for name in "before", "ppo", "dpo":
        written[name] = [row[name] for row in samples]
    figures = {name: shares(written[name], known, pairs) for name in written}
    for name, (real, held, distinct) in figures.items():
        print(f"{name:11}{real:15.3f}{held:16.3f}{distinct:12.2f}")

    cut = cut_prompts(samples, held_out)
    if cut:
        print(f"FAIL: {len(cut)} prompts end inside a word, the first: {cut[0]!r}")
    few = figures["before"][0] < 0.85
    if few:
        print("FAIL: fewer than 85 % of the language model's words are real ones")
    sys.exit(1 if cut or few else 0)


if __name__ == "__main__":
    main()
