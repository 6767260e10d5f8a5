#!/usr/bin/env python3
"""check_style.py [CLANG_FORMAT]: is align.c laid out as its readers and their debugger need it?

From the folder of align.c. Lines have 100 columns at most, in test_align.c too. In align.c no line initialises several
variables, no body stands on the line of its condition, no function is longer than LINES or takes more than PARAMETERS; before
Part IV at least SHARE of the lines are comments, and the first formula, PPO's loss and DPO's stand where Part I is. With the path of a
clang-format (18.1.8) both files are as it would lay them out. Prints the figures; exit 1 where one does not hold.
"""
import re
import statistics
import subprocess
import sys

COLUMNS, LINES, PARAMETERS, SHARE = 100, 50, 7, 0.30
BODY = re.compile(r"\s+(if|for|while) \(.*\) [^{/]*;\s*(/\*.*)?$")
SEVERAL = re.compile(r"\s+(const |unsigned |static )*(struct \w+|double|float|size_t|int|bool|char|uint\d+_t|FILE)\b"
                     r"[^;(]*=[^;]*,\s*\*?\w+\s*=[^=]")
faults = 0


def check(what, good, figures):
    global faults
    faults += not good
    print(f"{'ok   ' if good else 'FAIL '} {what}: {figures}")


def functions(lines):
    """(name, lines, parameters) of every function: its head begins at the margin, its last line is a brace there."""
    i = 0
    while i < len(lines):
        head, j = lines[i], i
        if re.match(r"[A-Za-z]", head) and "(" in head and not head.startswith(("typedef", "enum", "union")):
            while "{" not in head and ";" not in head and j + 1 < len(lines):
                j += 1
                head += " " + lines[j].strip()
            m = re.match(r"[^=;]*?\b(\w+)\s*\(([^{;]*)\)\s*\{", re.sub(r"__attribute__\(\(.*?\)\)\)? ?", "", head))
            if m and "=" not in head.split("(")[0]:
                end = next(k for k in range(j, len(lines)) if lines[k] == "}" or (k == j and lines[k].endswith("}")))
                depth, count = 0, 0 if m[2].strip() in ("", "void") else 1
                for c in m[2]:
                    depth += (c in "([{") - (c in ")]}")
                    count += c == "," and depth == 0
                yield m[1], end - i + 1, count
                i = end
        i += 1


def comment_lines(lines):
    """For each line whether it holds nothing but a comment."""
    inside = False
    for line in lines:
        text = line.strip()
        begins = text.startswith("/*")
        yield inside or begins
        inside = (inside or begins) and "*/" not in text


def main():
    source, tests = (open(name, encoding="utf-8").read().split("\n") for name in ("align.c", "test_align.c"))
    long = [name for name, lines in (("align.c", source), ("test_align.c", tests)) for line in lines if len(line) > COLUMNS]
    check("columns", not long, f"{len(long)} lines over {COLUMNS}")
    several = [n for n, line in enumerate(source, 1) if SEVERAL.match(line) and "for" not in line]
    check("a variable a line", not several, f"{len(several)} lines initialise several {several[:5] or ''}")
    bodies = [n for n, line in enumerate(source, 1) if BODY.match(line)]
    check("a statement a line", not bodies, f"{len(bodies)} bodies on the line of their condition {bodies[:5] or ''}")

    every = list(functions(source))
    longest = max(every, key=lambda f: f[1])
    widest = max(every, key=lambda f: f[2])
    median = statistics.median(f[1] for f in every)
    check("functions", longest[1] <= LINES and widest[2] <= PARAMETERS,
          f"{len(every)}, median {median:.0f} lines, longest {longest[1]} ({longest[0]}), most parameters {widest[2]} ({widest[0]})")

    part4 = next(n for n, line in enumerate(source) if line.startswith(" * Part IV - "))
    kinds = list(comment_lines(source[:part4]))
    written = sum(bool(line.strip()) for line in source[:part4])
    share = sum(kinds) / written
    check("comments", share >= SHARE, f"{share:.0%} of the lines before Part IV")
    at = {name: next(n for n, line in enumerate(source, 1) if re.match(r"static .*\b%s\(" % name, line))
          for name in ("sigmoid", "ppo_token_loss", "dpo_pair_loss")}
    check("order", at["sigmoid"] < 500 and max(at.values()) < 1600, ", ".join(f"{k} at line {v}" for k, v in at.items()))
    for name in sys.argv[1:]:
        said = subprocess.run([name, "--dry-run", "-Werror", "align.c", "test_align.c"], capture_output=True, text=True)
        check("clang-format", said.returncode == 0, said.stderr.strip().split("\n")[0] or "nothing to change")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
