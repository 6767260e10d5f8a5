#!/usr/bin/env python3
"""check_docs.py -- runs the commands that the documents show, as a reader would type them.

    python3 docs/tools/check_docs.py                README.md and docs/*.md, with models of a
                                                    shortened `make run`
    python3 docs/tools/check_docs.py --out out      with the models of a folder that is there
    python3 docs/tools/check_docs.py docs/labs.md   one document

What is run: each command in a block that begins with ```sh, and the commands of the table under
"Single commands" in README.md. They run in order, with bash, in a scratch copy of the repository,
where ./align is built and out/ holds models. Each is on its own: `cd` and variables do not last. A
command that stands in several places runs once, and `make run` is the shortened run that was made
first.

A block that needs what is not here, or takes too long, says so in a comment of its own on the line
before it:

    <!-- not run: needs aclImdb_v1.tar.gz -->

docs/debugging.md and docs/glossary.md have checkers of their own. Exit 0: all passed; 1: one
failed; 2: wrong usage.
"""

import argparse
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
ELSEWHERE = ("docs/debugging.md", "docs/glossary.md")
SHORT_RUN = "./align rlhf --pretrain_steps 150 --reward_steps 60 --ppo_steps 4 --dpo_steps 8"
NOT_RUN = re.compile(r"\s*<!-- not run: (.+) -->\s*$")


class Failure(Exception):
    """A document that is not as it should be: line number, message."""


# ---- Finding commands ----------------------------------------------------------------------------


def split_commands(lines):
    """[(line number, text)] of a block -> [(line number, command)].

    A command goes on to the next line after a backslash, inside <<EOF ... EOF, and while bash finds
    it unfinished (quotes, loops).
    """
    commands, begin, text, heredoc = [], 0, "", None
    for number, line in lines:
        if not text and (not line.strip() or line.lstrip().startswith("#")):
            continue
        begin = begin if text else number
        text += line + "\n"
        if heredoc is None:
            found = re.search(r"<<-?\s*['\"]?(\w+)", line)
            heredoc = found.group(1) if found else None
        elif line.strip() == heredoc:
            heredoc = None
        if heredoc or line.endswith("\\"):
            continue
        if subprocess.run(["bash", "-n", "-c", text], stderr=subprocess.DEVNULL).returncode == 0:
            commands.append((begin, text.strip()))
            text = ""
    return commands + ([(begin, text.strip())] if text else [])


def table_command(line):
    """The second cell of `| name | `command` |`, where \\| stands for |."""
    cells = re.split(r"(?<!\\)\|", line)
    found = re.search(r"`([^`]+)`", cells[2]) if len(cells) > 3 else None
    return found.group(1).replace("\\|", "|") if found else None


def find_commands(path, lines):
    """[(line number, command or None for a whole block, reason not to run it or None)]"""
    commands, block, begin, fence, reason, heading = [], [], 0, None, None, ""
    for number, line in enumerate(lines, 1):
        mark = re.match(r"\s*```(\w*)", line)
        if fence is not None:
            if not mark:
                block.append((number, line))
                continue
            if fence == "sh" and reason:
                commands.append((begin, None, reason))
            elif fence == "sh":
                commands += [(n, command, None) for n, command in split_commands(block)]
            fence, reason = None, None
            continue
        if reason and not (mark and mark.group(1) == "sh"):
            raise Failure(
                number - 1, 'a comment "not run" was expected to stand on the line before ```sh'
            )
        if mark:
            fence, block, begin = mark.group(1), [], number
        elif NOT_RUN.match(line):
            reason = NOT_RUN.match(line).group(1)
        elif line.startswith("#"):
            heading = line.strip("# ")
        elif path == "README.md" and heading == "Single commands" and line.startswith("| `"):
            command = table_command(line)
            if command is None:
                raise Failure(number, "a command in backticks was expected in the second cell")
            commands.append((number, command, None))
    if fence is not None:
        raise Failure(begin, "a block begins here and does not end")
    return commands


# ---- Running them --------------------------------------------------------------------------------


def run(command, folder, timeout):
    """(succeeded, seconds, output).

    A pipe fails with any of its parts; one that `head` ended early has not failed.
    """
    begin = time.time()
    process = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, status = process.communicate(timeout=timeout)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, status = process.communicate()[0] + b"\nnot done after %d s" % timeout, None
    succeeded = status in (0, 128 + signal.SIGPIPE)
    return succeeded, time.time() - begin, output.decode("utf-8", "replace").strip()


def scratch_copy(folder, out):
    """The working tree's files that git knows or would take, ./align if it is built, and `out`."""
    command = "git ls-files -z --cached --others --exclude-standard".split()
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    for name in listed.decode().split("\0") + ["align", "test_align"]:
        source, copy = os.path.join(ROOT, name), os.path.join(folder, name)
        if name and os.path.isfile(source):
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copy2(source, copy)  # with its time, for make
    if out:
        shutil.copytree(out, os.path.join(folder, "out"))


class Report:
    def __init__(self):
        self.passed, self.failed = 0, 0

    def line(self, word, where, seconds, text):
        took = "" if seconds is None else "%.1f s" % seconds
        print("%-5s %-24s %6s  %s" % (word, where, took, text), flush=True)

    def result(self, where, command, ok, seconds, output):
        self.passed, self.failed = self.passed + ok, self.failed + (not ok)
        shown = command.split("\n")[0] + (" ..." if "\n" in command else "")
        last = output.splitlines()[-1] if output else "(nothing printed) " + shown
        self.line("ok" if ok else "FAIL", where, seconds, last[:150] if ok else shown)
        for line in [] if ok else output.splitlines()[-10:]:
            print("      | " + line)


def main():
    parser = argparse.ArgumentParser(description="Runs the commands that the documents show.")
    parser.add_argument(
        "documents", nargs="*", metavar="FILE", help="default: README.md and docs/*.md"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="models to use as out/ (default: made by %s)" % SHORT_RUN
    )
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=120, help="seconds a command may take (120)"
    )
    args = parser.parse_args()
    if args.out and not os.path.isdir(args.out):
        parser.error("--out %s: there is no such folder" % args.out)
    documents = args.documents or [ROOT + "/README.md"] + sorted(glob.glob(ROOT + "/docs/*.md"))
    names = [os.path.relpath(os.path.realpath(d), ROOT) for d in documents]
    for name in names:
        if not os.path.isfile(os.path.join(ROOT, name)):
            parser.error("%s: there is no such file" % name)
    report, done, skipped, begin = Report(), {}, 0, time.time()
    with tempfile.TemporaryDirectory(prefix="check_docs.") as folder:
        scratch_copy(folder, args.out)
        report.result("make", "make", *run("make align", folder, 600))
        if not args.out:
            report.result("out/", SHORT_RUN, *run(SHORT_RUN, folder, 600))
        for name in names:
            if name in ELSEWHERE:
                continue
            try:
                with open(os.path.join(ROOT, name), encoding="utf-8") as f:
                    found = find_commands(name, f.read().split("\n"))
            except Failure as e:
                report.result("%s:%d" % (name, e.args[0]), e.args[1], False, 0, "")
                continue
            for number, command, reason in found:
                where = "%s:%d" % (name, number)
                plain = command and re.sub(r"\s+#.*$", "", command)
                if command is None:
                    report.line("skip", where, None, reason)
                    skipped += 1
                elif plain == "make run":
                    report.line("as", where, None, "out/, the shortened run")
                elif plain in done:
                    report.line("as", where, None, done[plain])
                else:
                    done[plain] = where
                    report.result(where, command, *run(command, folder, args.timeout))
    if not done and not skipped and not report.failed:
        report.result("documents", "no command was found in them", False, 0, "")
    print("%.0f s; %d blocks not run" % (time.time() - begin, skipped))
    print("%d passed, %d failed" % (report.passed, report.failed))
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
