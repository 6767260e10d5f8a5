"""A reward for answers of about twelve words: 0 for just that many, -1 for each word more or less.

    ./align ppo ... --reward_command "python3 docs/rewards/length.py 12"
"""

import json
import sys

target = int(sys.argv[1]) if len(sys.argv) > 1 else 12
for line in sys.stdin:
    words = json.loads(line)["completion"].split()
    print(-abs(len(words) - target))
