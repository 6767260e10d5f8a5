"""A checker of sums. Each row of the data has the right answer beside its prompt:

    {"prompt": "17+25=", "completion": "42", "answer": 42}

1 if the first number that the model writes is the answer, else 0; null, no score, if the row has
no answer. Sums of two-digit numbers, all 8,100 of them in one order (seed 0), to learn from:

    python3 docs/rewards/sums.py --make 7600             the first 7600
    python3 docs/rewards/sums.py --make 7600 --text      the same as text, for align pretrain
    python3 docs/rewards/sums.py --make 500 --held_out   the last 500: none of those
    python3 docs/rewards/sums.py --make 7600 --careless  completions by somebody who forgets three
                                                         carries of four: "32"; answer stays right
"""

import json
import re
import sys


def make(n, flags):
    """n of all sums in a shuffled order, as rows on standard output."""
    import random  # here, since the checker is started once a batch and needs none

    rng = random.Random(0)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(sums)
    for a, b in sums[len(sums) - n :] if "--held_out" in flags else sums[:n]:
        forgets = "--careless" in flags and a % 10 + b % 10 > 9 and rng.random() < 0.75
        prompt, completion = "%d+%d=" % (a, b), str(a + b - 10 * forgets)
        if "--text" in flags:
            row = {"text": prompt + completion}
        else:
            row = {"prompt": prompt, "completion": completion, "answer": a + b}
        print(json.dumps(row))


def judge(row):
    """The score of one answer, as a line."""
    if "answer" not in row:
        return "null"
    number = re.search(r"-?\d+", row["completion"])
    return int(number is not None and int(number.group()) == row["answer"])


if sys.argv[1:2] == ["--make"]:
    make(int(sys.argv[2]), sys.argv[3:])
else:
    for line in sys.stdin:
        print(judge(json.loads(line)))
