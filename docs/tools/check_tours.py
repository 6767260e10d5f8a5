#!/usr/bin/env python3
"""Runs the eight tours of docs/debugging.md in gdb: do they print what is written there?

    python3 docs/tools/check_tours.py              from anywhere; needs gdb, a C compiler and make
    python3 docs/tools/check_tours.py --doc FILE   another copy of the document
    python3 docs/tools/check_tours.py --write      puts what is printed now into the document

The document's set-up is every ```sh block before its first ```gdb block; `make debug` is left out
when align_debug is newer than align.c. A tour is a ```gdb block and the ```text block behind it.
Compared are the lines that start with "|": text and whole numbers exactly, other numbers to 0.2 %
or one unit of the last digit written. To show that a wrong number would be seen, every number
written is altered in turn, and the comparison has to notice.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|-?\binf\b|-?\bnan\b")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
GDB = ["gdb", "-nx", "-q", "-batch"]
SECONDS, SETUP_SECONDS = 60, 300


def parse(document):
    """The set-up's commands, and the tours: title, commands, what is printed, where that stands."""
    setup, tours, blocks = [], [], list(BLOCK.finditer(document))
    for i, block in enumerate(blocks):
        kind, body = block.groups()
        if kind == "sh" and not tours:
            setup.append(body)
        if kind == "gdb":
            headings = re.findall(r"^## (.*)$", document[: block.start()], re.M)
            printed = blocks[i + 1] if i + 1 < len(blocks) else None
            if printed is None or printed[1] != "text":
                sys.exit(f"{headings[-1]}: no ```text block follows its ```gdb block")
            tours.append((headings[-1], body, lines_of(printed[2]), printed.span(2)))
    return "".join(setup), tours


def lines_of(text):
    return [line.rstrip() for line in text.splitlines() if line.startswith("|")]


def is_whole(number):
    return number.lstrip("-").isdigit()


def unit(number):
    """What one in the last digit behind the point is worth; 0 without a point."""
    digits, _, power = number.partition("e")
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2])) if "." in digits else 0


def same_number(written, printed):
    if is_whole(written) and is_whole(printed):
        return int(written) == int(printed)
    a, b = float(written), float(printed)
    if not (math.isfinite(a) and math.isfinite(b)):
        return written == printed
    return abs(a - b) <= max(2e-3 * abs(a), 1.001 * unit(written), 1e-6)


def same_line(written, printed):
    if NUMBER.sub("#", written).split() != NUMBER.sub("#", printed).split():
        return False
    return all(same_number(a, b) for a, b in zip(NUMBER.findall(written), NUMBER.findall(printed)))


def difference(written, printed):
    """None, or the first line that is not as written."""
    for i in range(max(len(written), len(printed))):
        a = written[i] if i < len(written) else "(nothing)"
        b = printed[i] if i < len(printed) else "(nothing)"
        if not same_line(a, b):
            return f"line {i + 1}\n    written: {a}\n    printed: {b}"
    return None


def altered(number):
    if is_whole(number):
        return str(int(number) + 1)
    if not re.search(r"\d", number):
        return "0.5"
    return repr(float(number) + max(5e-3 * abs(float(number)), 3 * unit(number)))


def unnoticed(written):
    """A line of which an altered number would pass, or None."""
    for line in written:
        for number in NUMBER.finditer(line):
            wrong = line[: number.start()] + altered(number[0]) + line[number.end() :]
            if same_line(line, wrong):
                return wrong
    return None


def run(command, seconds, **options):
    """Exit status, standard output and errors; status None when the time is over."""
    environment = dict(os.environ)
    for name in ("DEBUGINFOD_URLS", "ALIGN_KERNEL"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=seconds,
            encoding="utf-8",
            errors="replace",
            **options,
        )
    except subprocess.TimeoutExpired:
        return None, "", f"not done after {seconds} seconds"
    return done.returncode, done.stdout, done.stderr


def gdb_tour(commands):
    """What a tour prints, and gdb's complaint if it stopped early."""
    with tempfile.NamedTemporaryFile("w", suffix=".gdb", encoding="utf-8") as script:
        script.write(commands)
        script.flush()
        status, out, err = run([*GDB, "-x", "docs/tools/align.gdb", "-x", script.name], SECONDS)
    complaint = None
    if "Error in sourced command file" in err or status is None:
        complaint = "\n".join("    " + line for line in err.strip().splitlines()[-6:])
    return lines_of(out), complaint


def prepare(setup):
    binary, source = os.path.join(ROOT, "align_debug"), os.path.join(ROOT, "align.c")
    if os.path.exists(binary) and os.path.getmtime(binary) > os.path.getmtime(source):
        setup = re.sub(r"^make debug$", "", setup, flags=re.M)
    status, out, err = run(["sh", "-e", "-c", setup], SETUP_SECONDS)
    if status != 0:
        print(f"the set-up failed:\n{out[-500:]}{err[-1000:]}\n0 passed, 1 failed")
        sys.exit(1)


def cannot_run():
    if not shutil.which("gdb"):
        return "gdb is not installed"
    _, out, err = run([*GDB, "-ex", "run", "--args", shutil.which("true")], SECONDS)
    if "exited normally" not in out:
        reason = (err.strip().splitlines() or ["no reason given"])[-1]
        return "gdb is not allowed to run programs here: " + reason
    return None


def main():
    options = argparse.ArgumentParser(description="Checks the tours of docs/debugging.md.")
    options.add_argument("--doc", default=os.path.join(ROOT, "docs", "debugging.md"))
    written = "put what is printed now into the document"
    options.add_argument("--write", action="store_true", help=written)
    options = options.parse_args()
    reason = cannot_run()
    if reason:
        print(f"{reason}\n0 passed, 0 failed")
        return 0
    with open(options.doc, encoding="utf-8") as file:
        document = file.read()
    setup, tours = parse(document)
    prepare(setup)
    failed = 0
    for title, commands, written, (start, end) in reversed(tours) if options.write else tours:
        printed, complaint = gdb_tour(commands)
        if options.write:
            document = document[:start] + "\n".join(printed) + "\n" + document[end:]
            written = printed
        wrong = complaint or difference(written, printed)
        if not wrong and not written:
            wrong = "nothing is written to compare with"
        if not wrong and unnoticed(written):
            wrong = f"an altered number would not be seen: {unnoticed(written)}"
        failed += wrong is not None
        said = f"FAIL  {title}: {wrong}" if wrong else f"pass  {title}: {len(written)} lines"
        print(said, flush=True)
    if options.write:
        with open(options.doc, "w", encoding="utf-8") as file:
            file.write(document)
    print(f"{len(tours) - failed} passed, {failed} failed")
    return 1 if failed or not tours else 0


if __name__ == "__main__":
    sys.exit(main())
