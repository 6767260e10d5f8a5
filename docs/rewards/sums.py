"""A checker of sums. Each row of the data has the right answer beside its prompt:

    {"prompt": "17 + 25 =", "completion": " 42", "answer": 42}

1 if the first number that the model writes is the answer, else 0; null, no score, if the row has
no answer. `python3 docs/rewards/sums.py --make 4000` writes rows of two-digit sums.
"""

import json
import random
import re
import sys

if len(sys.argv) > 2 and sys.argv[1] == "--make":
    rng = random.Random(0)
    for _ in range(int(sys.argv[2])):
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        row = {"prompt": "%d + %d =" % (a, b), "completion": " %d" % (a + b), "answer": a + b}
        print(json.dumps(row))
    sys.exit()

for line in sys.stdin:
    row = json.loads(line)
    number = re.search(r"-?\d+", row["completion"])
    if "answer" not in row:
        print("null")
    else:
        print(int(number is not None and int(number.group()) == row["answer"]))
