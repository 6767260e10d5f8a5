#!/usr/bin/env python3
"""Exercises: functions of align.c to be written by the reader, and the proof that they are sound.

    python3 docs/tools/exercise.py                   the list (make exercise)
    python3 docs/tools/exercise.py NAME [--force]    makes exercise/NAME (make exercise NAME=...)
    python3 docs/tools/exercise.py --check NAME      builds and judges it (make check, in there)
    python3 docs/tools/exercise.py --prove [WORD...] proves functions and questions (-j 2); WORD:
                                                     only those whose name or number starts so

exercise/NAME holds align.c with that function emptied, test_align.c and a Makefile. Hints are in
Portuguese where LANGUAGE or LANG says pt. Functions, tests, hints and what the questions of
docs/exercises.md change are in docs/tools/exercises.json. --prove needs make's compiler (CC) and,
for the questions, docs/exercises.md and docs/exercises.pt-BR.md; it fails if an empty body passes
a test, an original fails one, a broken program passes a test that the answer names, or a number
in an answer is not what ./align explain prints.
"""
import argparse
import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HERE = os.path.dirname(os.path.abspath(__file__))
TODO = "    /* TODO: write this function; the comment above it says what it must do. */\n"
TOY = "--json --quiet --vocab_size 2 --max_new_tokens 2 --n_layer 1 --n_embd 8".split()
MAKEFILE = """# make check     builds and runs the tests that judge %(name)s
# make solution  the difference between this align.c and the original
check:
\t@python3 ../../docs/tools/exercise.py --check %(name)s

solution:
\t@diff -u align.c ../../align.c || true

.PHONY: check solution
"""


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def portuguese():
    for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        if os.environ.get(name):
            return os.environ[name].startswith("pt")
    return False


# ------------------------------------------------------------------------------------ functions

def find_function(source, name):
    """The places in source where the head of a function begins, its body, and what follows it."""
    found = re.search(r"^(?:WIDE )?static [^;{}()=]*\b%s\([^;{]*\) \{\n" % name, source, re.M)
    if not found:
        sys.exit("exercise.py: align.c has no function %s" % name)
    return found.start(), found.end(), source.index("\n}\n", found.end()) + 1


def parameters(head, name):
    """The names of a function's parameters."""
    inside = re.sub(r"\s+", " ", head[head.index(name + "(") + len(name) + 1:head.rindex(")")])
    names = [re.search(r"(\w+)(\[[^]]*\])?$", part.strip()).group(1) for part in inside.split(",")]
    return [] if names == ["void"] else names


def empty_body(head, name):
    """A body that compiles: it leaves what it could write untouched and returns zero."""
    body = TODO + "".join("    (void)%s;\n" % p for p in parameters(head, name))
    kind = re.sub(r"\b(WIDE|static|inline)\b", "", head[:head.index(name + "(")]).strip()
    if kind.endswith("*"):
        return body + "    return NULL;\n"
    if kind.startswith("struct"):
        return body + "    return (%s){0};\n" % kind
    return body + {"void": "", "bool": "    return false;\n"}.get(kind, "    return 0;\n")


def emptied(source, name):
    start, inside, end = find_function(source, name)
    return source[:inside] + empty_body(source[start:inside], name) + source[end:]


# ---------------------------------------------------------------------------- building, running

def write(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


def build(folder, what="test_align", level="-O0"):
    """Compiles folder/what.c; the compiler's words if it refuses, else None."""
    command = os.environ.get("CC", "cc").split() + [level, what + ".c", "-o", what, "-lm"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout.decode(errors="replace") if done.returncode else None


def run_test(folder, test):
    """What a test says, and whether it passed. It runs where tokenizer.bin and docs are."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", TEST_THIN="1")
    try:
        done = subprocess.run([os.path.join(folder, "test_align"), test], cwd=ROOT, timeout=120,
                              env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired:
        return "%s: it did not end within 120 seconds\n" % test, False
    said = done.stdout.decode(errors="replace")
    if done.returncode < 0:
        return said + "%s: it crashed (%s)\n" % (test, signal.Signals(-done.returncode).name), False
    # a name selects all tests that begin so: only this one counts
    passed = not re.search("^FAILED %s:" % test, said, re.M) and not said.startswith("0 passed")
    return said, passed


def make_program(folder, align):
    """Writes and builds the tests of a changed align.c; the compiler's words if it refuses."""
    write(folder, "align.c", align)
    write(folder, "test_align.c", read("test_align.c"))
    return build(folder)


# ------------------------------------------------------------------------------- for the reader

def show_list(table):
    print("make exercise NAME=..., in the order of docs/exercises.md:")
    for evening in (1, 2, 3, 4):
        print("\nEvening %d" % evening)
        for entry in table["functions"]:
            if entry["evening"] == evening:
                print("    %-27s %s" % (entry["name"], " ".join(entry["tests"])))


def make_exercise(name, force):
    folder = os.path.join(ROOT, "exercise", name)
    mine = os.path.join(folder, "align.c")
    if os.path.exists(mine) and not force:
        sys.exit("exercise.py: exercise/%s has your work already: go on with it (make check, in "
                 "that folder), or start again with make exercise NAME=%s FORCE=1" % (name, name))
    os.makedirs(folder, exist_ok=True)
    write(folder, "align.c", emptied(read("align.c"), name))
    shutil.copy(os.path.join(ROOT, "test_align.c"), folder)
    write(folder, "Makefile", MAKEFILE % {"name": name})
    with open(mine, encoding="utf-8") as file:
        line = file.read().split(TODO)[0].count("\n") + 1
    print("exercise/%s/align.c, line %d: the body is yours to write. The comment above it says\n"
          "what it must do. Then:\n\n    cd exercise/%s\n    make check       the tests that "
          "judge it\n    make solution    the difference to the original" % (name, line, name))


def check(entry):
    """Builds the reader's program and runs the tests, up to the first that fails."""
    folder = os.path.join(ROOT, "exercise", entry["name"])
    if not os.path.exists(os.path.join(folder, "align.c")):
        sys.exit("exercise.py: exercise/%s has no align.c: make exercise NAME=%s, in the folder "
                 "of the original align.c" % (entry["name"], entry["name"]))
    refused = build(folder)
    if refused:
        print(refused, end="")
        sys.exit("exercise.py: the compiler refused exercise/%s/align.c" % entry["name"])
    for number, test in enumerate(entry["tests"], 1):
        said, passed = run_test(folder, test)
        verdict = "passed" if passed else "FAILED"
        print("%d/%d %s: %s" % (number, len(entry["tests"]), test, verdict))
        if not passed:
            lines = [line for line in said.splitlines() if line.startswith(test + ":")]
            print("".join("    %s\n" % line for line in (lines or said.splitlines())[:5]), end="")
            hint = entry["hint_pt" if portuguese() else "hint"]
            print("%s: %s" % ("Dica" if portuguese() else "Hint", hint))
            sys.exit(1)
    print("%s is yours. make solution shows how the original says it." % entry["name"])


# ------------------------------------------------------------------------------------ the proof

class Proof:
    """Runs checks a few at a time; keeps what failed."""

    def __init__(self, table, words, jobs):
        self.table = table
        self.words = words
        self.failures = []
        self.work = tempfile.mkdtemp()
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)

    def chosen(self, name):
        return not self.words or any(name.startswith(word) for word in self.words)

    def report(self, good, line):
        print(("ok    " if good else "FAIL  ") + line, flush=True)
        if not good:
            self.failures.append(line)

    def failing(self, name, align, tests):
        """Which of the tests do not pass with this align.c? Or what the compiler says."""
        folder = os.path.join(self.work, name)
        os.mkdir(folder)
        refused = make_program(folder, align)
        failing = refused or [test for test in tests if not run_test(folder, test)[1]]
        shutil.rmtree(folder)
        return failing

    def original(self):
        """No test that an exercise or an answer names may fail as it is."""
        tests = sum([entry["tests"] for entry in self.table["functions"]]
                    + [named_tests(name) for name in self.table["break"]], [])
        tests = sorted(set(tests))
        failing = self.failing("original", read("align.c"), tests)
        self.report(not failing, "the original passes %d tests%s" % (len(tests), failing or ""))

    def functions(self):
        source = read("align.c")
        entries = [e for e in self.table["functions"] if self.chosen(e["name"])]

        def one(entry):
            return self.failing(entry["name"], emptied(source, entry["name"]), entry["tests"])

        proven = 0
        for entry, failing in zip(entries, self.pool.map(one, entries)):
            proven += failing == entry["tests"]
            self.report(failing == entry["tests"], "%-26s empty, it fails %s" % (
                entry["name"], failing if isinstance(failing, str) else " ".join(failing)))
        print("%d of %d functions" % (proven, len(entries)))

    def broken(self):
        source = read("align.c")
        questions = [n for n in self.table["break"] if self.chosen(n)]

        def one(name):
            question = self.table["break"][name]
            align = broken_program(source, question)
            return (self.failing(name, align, named_tests(name)),
                    self.toy(name, align, question.get("exact", [])))

        for name, (failing, toy) in zip(questions, self.pool.map(one, questions)):
            self.report(failing and failing == named_tests(name),
                        "%-4s %s, changed, fails %s" % (
                            name, self.table["break"][name]["function"],
                            failing if isinstance(failing, str) else " ".join(failing)))
            self.numbers(name, "exact", toy)

    def toy(self, name, align, paths):
        """What align exact of a broken program says at these paths."""
        if not paths:
            return []
        folder = os.path.join(self.work, name + "_exact")
        os.mkdir(folder)
        write(folder, "align.c", align)
        if build(folder, "align", "-O1"):
            return []
        said = subprocess.check_output([os.path.join(folder, "align"), "exact"] + TOY, cwd=ROOT,
                                       env=dict(os.environ, OMP_NUM_THREADS="1"))
        return [at(json.loads(said), path) for path in paths]

    def numbers(self, name, source, want):
        """The bold numbers of an answer, in both languages, are these?"""
        for text in answers(name):
            found = re.findall(r"\*\*(-?\d+(?:[.,]\d+)?)\*\*", text)
            good = len(found) == len(want) and all(map(agrees, found, want))
            if found or want:
                self.report(good, "%-4s %s: the answer says %s, align %s" % (
                    name, source, " ".join(found), " ".join("%.6g" % x for x in want)))

    def predicted(self):
        questions = [n for n in self.table["predict"] if self.chosen(n)]
        if not questions:
            return
        write(self.work, "align.c", read("align.c"))
        refused = build(self.work, "align")
        if refused:
            self.report(False, refused)
            return
        for name in questions:
            question = self.table["predict"][name]
            try:
                changed = explained(self.work, question)
                want = [at(changed, path) for path in question["read"]]
            except (subprocess.CalledProcessError, KeyError, IndexError) as error:
                self.report(False, "%-4s %s: %s" % (name, question["topic"], error))
                continue
            self.numbers(name, question["topic"], want)


def broken_program(source, question):
    """align.c with the lines of one function changed as a question says."""
    start, _, end = find_function(source, question["function"])
    body = source[start:end]
    for old, new in question["change"]:
        if body.count(old) != 1:
            sys.exit("exercise.py: %s stands %d times in %s; exercises.json wants to change it" % (
                old.strip(), body.count(old), question["function"]))
        body = body.replace(old, new)
    return source[:start] + body + source[end:]


def answers(name):
    """The answer to a question, in English and in Portuguese."""
    found = []
    for path in ("docs/exercises.md", "docs/exercises.pt-BR.md"):
        lines = re.findall(r"^- \*\*%s\.\*\* (.*)$" % name, read(path), re.M)
        if len(lines) != 2:
            sys.exit("exercise.py: %s should have %s twice, question and answer" % (path, name))
        found.append(lines[1])
    return found


def named_tests(name):
    """The tests that the first sentence of the answer to a broken function names."""
    both = [re.findall(r"`(\w+)`", re.match(r"[^.]*", text).group(0)) for text in answers(name)]
    if both[0] != both[1]:
        sys.exit("exercise.py: the two answers to %s name different tests" % name)
    return both[0]


def agrees(written, number):
    """Is the number, rounded to as many digits, what is written?"""
    written = written.replace(",", ".")
    digits = len(written.partition(".")[2])
    return abs(float(written) - number) <= 0.5 * 10.0 ** -digits + 1e-9


def at(example, path):
    """What an object holds at answers.0.score, say."""
    for name in path.split("."):
        example = example[int(name) if name.isdigit() else name]
    return example


def explained(folder, question):
    """What align explain says once the built-in example is changed as in the question."""
    def explain(*flags):
        command = [os.path.join(folder, "align"), "explain", question["topic"], "--json"]
        return json.loads(subprocess.check_output(command + list(flags), cwd=ROOT))

    example = explain()
    for path, value in question["change"].items():
        inside, _, last = path.rpartition(".")
        (at(example, inside) if inside else example)[last] = value
    write(folder, "example.json", json.dumps(example))
    return explain("--example", os.path.join(folder, "example.json"))


def prove(table, words, jobs):
    proof = Proof(table, words, jobs)
    try:
        proof.predicted()
        proof.broken()
        if not words:
            proof.original()
        proof.functions()
    finally:
        shutil.rmtree(proof.work)
    print("%d failed" % len(proof.failures))
    sys.exit(bool(proof.failures))


def main():
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # make exercise | head
    parser = argparse.ArgumentParser(description="Exercises; docs/exercises.md is the path.")
    parser.add_argument("words", nargs="*", metavar="NAME")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--check", action="store_true", help="judge exercise/NAME")
    parser.add_argument("--prove", action="store_true", help="are the exercises sound?")
    parser.add_argument("-j", type=int, default=2, metavar="N", help="builds at a time (2)")
    options = parser.parse_args()
    table = json.loads(read("docs/tools/exercises.json"))
    if options.prove:
        prove(table, options.words, options.j)
    name = options.words[0] if options.words else ""
    entry = [e for e in table["functions"] if e["name"] == name]
    if not entry:
        if name:
            print("There is no exercise %s.\n" % name)
        show_list(table)
        sys.exit(bool(name))
    if options.check:
        check(entry[0])
    else:
        make_exercise(name, options.force)


if __name__ == "__main__":
    main()
