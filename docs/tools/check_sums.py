#!/usr/bin/env python3
"""check_sums.py -- do verifiable rewards work? docs/sums.md, from random weights.

    python3 docs/tools/check_sums.py                  three seeds
    python3 docs/tools/check_sums.py --seeds 42       one

Runs the first block of commands in docs/sums.md as it stands there, once for each seed, in a
scratch folder in place of out/ and with --seed added. Prints the seconds and CPU seconds of each
stage, and the share of right answers on held-out sums as each `align eval` of the block gives it.
A seed passes if every share is 0.4 to 0.65 before GRPO and above 0.9 after it. Ends with
'N passed, N failed'; exit 0: all passed; 1: one failed.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_block(commands, seed, folder):
    """[(stage, reward or None, seconds, CPU seconds)], a stage being align's command."""
    stages = []
    for command in commands:
        found = re.match(r"\./align (\w+)", command)
        if found:
            command += " --quiet --seed %d" % seed
        begin, cpu = time.time(), cpu_seconds()
        done = subprocess.run(
            ["bash", "-c", re.sub(r"\bout/", folder + "/", command)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit("check_sums.py: exit %d of: %s" % (done.returncode, command))
        reward = json.loads(done.stdout)["reward"] if " eval " in command else None
        if found:
            stages.append((found.group(1), reward, time.time() - begin, cpu_seconds() - cpu))
    return stages


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    seeds = parser.parse_args().seeds
    with open(os.path.join(ROOT, "docs/sums.md"), encoding="utf-8") as file:
        block = BLOCK.search(file.read())
    if not block:
        sys.exit("docs/sums.md: a block of commands was expected")
    # a script's folder is searched before the library: rewards/keyword.py would break `import re`
    for name in os.listdir(os.path.join(ROOT, "docs/rewards")):
        if name.partition(".")[0] in getattr(sys, "stdlib_module_names", ()):
            sys.exit("docs/rewards/%s hides Python's module of that name; rename it" % name)
    commands = block.group(1).replace("\\\n", " ").splitlines()

    passed = 0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            stages = run_block(commands, seed, folder)
        trained = [stage[0] for stage in stages].index("grpo")
        before, after = (
            [stage[1] for stage in part if stage[1] is not None]
            for part in (stages[:trained], stages[trained:])
        )
        good = before and after and 0.4 < min(before) and max(before) < 0.65 and min(after) > 0.9
        good = bool(good)
        passed += good
        print("seed %d: %s" % (seed, "ok" if good else "FAIL"))
        for name, reward, seconds, cpu in stages + [
            ("whole", None, sum(s[2] for s in stages), sum(s[3] for s in stages))
        ]:
            right = "" if reward is None else "%.3f right" % reward
            print("  %-9s %-12s %6.1f s %6.1f s of CPU" % (name, right, seconds, cpu), flush=True)
    print("%d passed, %d failed" % (passed, len(seeds) - passed))
    return passed < len(seeds)


if __name__ == "__main__":
    sys.exit(main())
