#!/usr/bin/env python3
"""check_style.py [CLANG_FORMAT]: is align.c laid out as its readers and their debugger need it?

From the folder of align.c. Lines have 100 columns at most, in test_align.c, in the scripts and in
docs/tools too. In align.c no line initialises several variables, no body stands on the line of its
condition, no function is longer than LINES or takes more than PARAMETERS. Before Part IV at least
SHARE of the lines are comments; inside the functions there are at least INSIDE comment lines to 100
lines of code, and of those longer than LONG lines at most BARE have no comment inside. The first
formula, PPO's loss and DPO's stand where Part I is. With the path of a clang-format (18.1.8) the C
files are as it would lay them out. Prints the figures; exit 1 where one does not hold.
"""

import collections
import os
import re
import statistics
import subprocess
import sys

COLUMNS, LINES, PARAMETERS, SHARE = 100, 50, 7, 0.30
INSIDE, BARE, LONG = 20, 0, 12
BODY = re.compile(r"\s+(if|for|while) \(.*\) [^{/]*;\s*(/\*.*)?$")
SEVERAL = re.compile(
    r"\s+(const |unsigned |static )*(struct \w+|double|float|size_t|int|bool|char|uint\d+_t|FILE)\b"
    r"[^;(]*=[^;]*,\s*\*?\w+\s*=[^=]"
)
TOOLS = "docs/tools"
SCRIPTS = ["prepare_imdb.py", ".ci/run"]
NOT_YET = ["README.md", "browser.py", "exercises.json"]
Function = collections.namedtuple("Function", "name first last parameters")  # lines from 0
faults = 0


def check(what, good, figures):
    global faults
    faults += not good
    print(f"{'ok   ' if good else 'FAIL '} {what}: {figures}")


def check_none(what, places, figures):
    """One check: no line is so; the first places where one is stand behind the figures."""
    check(what, not places, f"{len(places)} {figures} {places[:5] or ''}".rstrip())


def read(name):
    with open(name, encoding="utf-8") as file:
        return file.read().split("\n")


def over(columns, name, lines, size=len):
    """["name:line"] of the lines with more columns, which are letters, or what `size` counts."""
    return [f"{name}:{n}" for n, line in enumerate(lines, 1) if size(line) > columns]


def begins_function(line):
    """Is it the head of one, or the beginning of a head? Heads begin at the margin."""
    if not re.match(r"[A-Za-z]", line) or line.startswith(("typedef", "enum", "union")):
        return False
    return "(" in line


def parameters_of(text):
    """How many there are between the brackets of a head."""
    if text.strip() in ("", "void"):
        return 0
    depth, count = 0, 1
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        count += c == "," and depth == 0
    return count


def functions(lines):
    """Every Function: the last line of one is a brace at the margin, or it has one line alone."""
    i = 0
    while i < len(lines):
        head, j = lines[i], i
        if begins_function(head):
            while "{" not in head and ";" not in head and j + 1 < len(lines):
                j += 1
                head += " " + lines[j].strip()
            head = re.sub(r"__attribute__\(\(.*?\)\)\)? ?", "", head)
            m = re.match(r"[^=;]*?\b(\w+)\s*\(([^{;]*)\)\s*\{", head)
            if m and "=" not in head.split("(")[0]:
                last = j if lines[j].endswith("}") else lines.index("}", j)
                yield Function(m[1], i, last, parameters_of(m[2]))
                i = last
        i += 1


def comment_lines(lines):
    """For each line whether it holds nothing but a comment."""
    inside = False
    for line in lines:
        text = line.strip()
        begins = text.startswith("/*")
        yield inside or begins
        inside = (inside or begins) and "*/" not in text


def check_functions(every):
    longest = max(every, key=lambda f: f.last - f.first)
    widest = max(every, key=lambda f: f.parameters)
    most = longest.last - longest.first + 1
    median = statistics.median(f.last - f.first + 1 for f in every)
    check(
        "functions",
        most <= LINES and widest.parameters <= PARAMETERS,
        f"{len(every)}, median {median:.0f} lines, longest {most} ({longest.name}),"
        f" most parameters {widest.parameters} ({widest.name})",
    )


def check_comments(source, every):
    """Of the course, the parts before Part IV."""
    end = next(n for n, line in enumerate(source) if line.startswith(" * Part IV - "))
    comment = list(comment_lines(source[:end]))
    written = sum(bool(line.strip()) for line in source[:end])
    share = sum(comment) / written
    check("comments", share >= SHARE, f"{share:.0%} of the lines before Part IV")

    inside, code, bare = 0, 0, []
    for f in every:
        if f.last >= end:
            break
        body = range(f.first + 1, f.last + 1)
        found = sum(comment[n] for n in body)
        inside += found
        code += sum(bool(source[n].strip()) and not comment[n] for n in (f.first, *body))
        if len(body) > LONG and not found:
            bare.append(f.name)
    per_100 = 100 * inside / code
    check("comments inside", per_100 >= INSIDE, f"{per_100:.1f} to 100 lines of code")
    said = f"{len(bare)} functions of more than {LONG} lines have no comment inside"
    names = ": " + " ".join(bare[:5]) if bare else ""
    check("bare functions", len(bare) <= BARE, said + names)


def check_order(source):
    at = {}
    for name in ("sigmoid", "ppo_token_loss", "dpo_pair_loss"):
        head = re.compile(r"static .*\b%s\(" % name)
        at[name] = next(n for n, line in enumerate(source, 1) if head.match(line))
    said = ", ".join(f"{name} at line {n}" for name, n in at.items())
    check("order", at["sigmoid"] < 500 and max(at.values()) < 1600, said)


def check_scripts(tools):
    """The scripts, and what else stands in docs/tools: here columns are bytes."""
    names = [name for name in tools + SCRIPTS if os.path.basename(name) not in NOT_YET]
    long = []
    for name in names:
        long += over(COLUMNS, name, read(name), lambda line: len(line.encode()))
    check_none("columns of scripts", long, f"lines over {COLUMNS} in {len(names)} files")


def check_format(program, files):
    command = [program, "--style=file", "--dry-run", "-Werror", *files]
    said = subprocess.run(command, capture_output=True, text=True)
    first = said.stderr.strip().split("\n")[0]
    check("clang-format", said.returncode == 0, first or "nothing to change")


def main():
    source, tests = read("align.c"), read("test_align.c")
    long = over(COLUMNS, "align.c", source) + over(COLUMNS, "test_align.c", tests)
    check_none("columns", long, f"lines over {COLUMNS}")
    tools = [f"{TOOLS}/{name}" for name in sorted(os.listdir(TOOLS))]
    tools = [name for name in tools if os.path.isfile(name)]
    check_scripts(tools)
    several = [n for n, line in enumerate(source, 1) if SEVERAL.match(line) and "for" not in line]
    check_none("a variable a line", several, "lines initialise several")
    bodies = [n for n, line in enumerate(source, 1) if BODY.match(line)]
    check_none("a statement a line", bodies, "bodies on the line of their condition")
    every = list(functions(source))
    check_functions(every)
    check_comments(source, every)
    check_order(source)
    for program in sys.argv[1:]:
        c_files = [name for name in tools if name.endswith(".c")]
        check_format(program, ["align.c", "test_align.c", *c_files])
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
