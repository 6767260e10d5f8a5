"""A reward for each of some words in the answer: python3 docs/rewards/words.py good great"""

import json
import sys

for line in sys.stdin:
    words = json.loads(line)["completion"].lower().split()
    print(sum(word.strip(".,;:!?'\"") in sys.argv[1:] for word in words))
